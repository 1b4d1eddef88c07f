"""Norms against straightforward torch and transformers."""

import pytest
import torch
import torch.nn.functional as F
from tiny.accuracy import assert_as_exact_as, randn
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRMSNormGated
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNormGated

from prism_kernels.norm import reference

DTYPES = [torch.float32, torch.bfloat16]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def plain_rms_norm(x, weight):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def plain_gated_rms_norm(groups):
    def run(y, z, weight):
        acc = torch.promote_types(y.dtype, torch.float32)
        gated = (y.to(acc) * F.silu(z.to(acc))).unflatten(-1, (groups, -1))
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + 1e-5)
        return (weight * normed.flatten(-2)).to(y.dtype)

    return run


@both_dtypes
def test_rms_norm(dtype):
    torch.manual_seed(0)
    inputs = [randn(5, 3, 33, dtype=dtype), randn(33, dtype=dtype)]
    assert_as_exact_as(lambda x, w: reference.rms_norm(x, w, 1e-5), plain_rms_norm, inputs)
    norm = LlamaRMSNorm(33, 1e-5).to(dtype)
    norm.weight.data = inputs[1]
    torch.testing.assert_close(reference.rms_norm(*inputs, 1e-5), norm(inputs[0]))


@both_dtypes
@pytest.mark.parametrize("groups", [1, 3])
def test_gated_rms_norm(dtype, groups):
    torch.manual_seed(0)
    inputs = [randn(7, 24, dtype=dtype), randn(7, 24, dtype=dtype), randn(24, dtype=dtype)]
    ours = reference.gated_rms_norm
    assert_as_exact_as(lambda *a: ours(*a, 1e-5, groups), plain_gated_rms_norm(groups), inputs)


def test_gated_rms_norm_equals_transformers():
    y, z, weight = randn(7, 24).float(), randn(7, 24).float(), randn(24).float()
    for norm, groups in ((NemotronHRMSNormGated(24, 8, 1e-5), 3), (GraniteMoeHybridRMSNormGated(24, 24, 1e-5), 1)):
        norm.weight.data = weight
        torch.testing.assert_close(reference.gated_rms_norm(y, z, weight, 1e-5, groups), norm(y, z))
