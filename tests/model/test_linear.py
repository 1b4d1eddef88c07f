"""A linear of several parameters is one product with all of them, in training and in a decoding step."""

import pytest
import torch
from ranks import run_ranks
from tiny.models import SPECS

from prism_mcore.model.context import ModelContext, transformer_config
from prism_mcore.model.linear import ColumnLinearOfParts
from prism_mcore.model.ops import Ops

ROWS = {"own": 24, "shared": 10}


def products(groups, linear):
    """(output, gradient of x, gradients of the weights): as one linear, and as one product for each parameter."""
    device = torch.device("cpu")
    config = transformer_config(SPECS["hybrid"], groups, torch.float32, False, device)
    ops = Ops({"linear": linear}, device)
    generator = torch.Generator().manual_seed(0)
    module = ColumnLinearOfParts(ModelContext(SPECS["hybrid"], config, groups, ops), ROWS, 48)
    for weight in module.parameters():
        weight.data.normal_(generator=generator)
    x = torch.randn(5, 1, 48, generator=generator, requires_grad=True)
    together = module(x)[0]
    separate = torch.cat([x @ weight.t() for weight in module.parameters()], dim=-1)
    inputs = (x, *module.parameters())
    found = [(y.detach(), *torch.autograd.grad(y.square().sum(), inputs)) for y in (together, separate)]
    return found, module.separate_products(x.detach()), [name for name, _ in module.named_parameters()]


@pytest.mark.parametrize("linear", ["megatron", "exact"])
def test_one_product_is_those_with_each_parameter(linear):
    (((together, separate), decoded, names),) = run_ranks(1, products, linear)
    assert names == ["own_weight", "shared_weight"]
    for got, want in zip(together, separate, strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(decoded, together[0])
