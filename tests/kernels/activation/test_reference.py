"""Activations against straightforward torch."""

import pytest
import torch
import torch.nn.functional as F
from tiny.accuracy import assert_as_exact_as, randn

from prism_kernels.activation import reference

DTYPES = [torch.float32, torch.bfloat16]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


@both_dtypes
def test_activations(dtype):
    torch.manual_seed(0)
    x = [randn(9, 26, dtype=dtype)]
    assert_as_exact_as(reference.swiglu, lambda x: F.silu(x[:, :13]) * x[:, 13:], x)
    assert_as_exact_as(reference.squared_relu, lambda x: F.relu(x).square(), x)
