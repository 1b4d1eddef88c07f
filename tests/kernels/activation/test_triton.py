"""The Triton activations against plain torch in their dtype and in fp64."""

import pytest
import torch
import torch.nn.functional as F
from tiny.accuracy import DEVICE, assert_as_exact_as, randn, value_and_gradients

from prism_kernels.activation import reference, triton
from prism_kernels.backends import Uncovered

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Widths of the result: less than a block, a whole one, and two with a rest.
widths = pytest.mark.parametrize("width", [13, 1024, 2100])


def plain_swiglu(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


OPS = {
    "swiglu": (triton.swiglu, plain_swiglu, 2),
    "squared_relu": (triton.squared_relu, lambda x: F.relu(x).square(), 1),
}
ops = pytest.mark.parametrize(("ours", "plain", "factor"), OPS.values(), ids=OPS.keys())


@dtypes
@widths
@ops
def test_values_and_gradients(ours, plain, factor, width, dtype):
    torch.manual_seed(0)
    assert_as_exact_as(ours, plain, [randn(3, 1, factor * width, dtype=dtype).to(DEVICE)])


@pytest.mark.parametrize(("offset", "width"), [(8, 72), (3, 71)])  # aligned to 16 bytes, and not at all
@ops
def test_columns_of_a_wider_buffer_are_read_where_they_lie(ours, plain, factor, offset, width):
    torch.manual_seed(0)
    x = randn(5, width, dtype=torch.bfloat16).to(DEVICE)[:, offset : offset + 48]
    upstream = randn(5, width, dtype=torch.bfloat16).to(DEVICE)[:, offset : offset + 48 // factor]
    packed = value_and_gradients(ours, [x.contiguous()], upstream.contiguous())
    leaf = x.detach().requires_grad_()
    out = ours(leaf)
    assert torch.equal(out, packed[0])
    assert torch.equal(torch.autograd.grad(out, leaf, upstream)[0], packed[1])


@ops
def test_transposed_input_and_no_rows(ours, plain, factor):
    x = randn(16, 3, dtype=torch.float32).to(DEVICE).t()
    torch.testing.assert_close(ours(x), plain(x))
    empty = torch.empty(0, 16, device=DEVICE, requires_grad=True)
    out = ours(empty)
    assert out.shape == (0, 16 // factor)
    assert torch.autograd.grad(out.sum(), empty)[0].shape == (0, 16)


@ops
def test_what_is_not_a_number_stays_visible(ours, plain, factor):
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0]], device=DEVICE)
    assert torch.equal(ours(x).isnan(), plain(x).isnan())


def test_fp64_is_left_to_the_reference():
    x = randn(2, 8).to(DEVICE)
    for op in (triton.swiglu, triton.squared_relu):
        with pytest.raises(Uncovered, match="float64: needs bf16, fp16 or fp32"):
            op(x)
    assert reference.swiglu(x).dtype == torch.float64
