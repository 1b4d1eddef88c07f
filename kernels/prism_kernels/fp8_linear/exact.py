"""The product of two quantised matrices, each row's bits the same whatever other rows are in the call."""

import torch
from torch import Tensor

from prism_kernels.fp8 import Quantized
from prism_kernels.linear import exact


def fp8_linear(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """a [m, k], b [n, k] -> a @ b.T [m, n] of `dtype`, as `reference` has it, in products of a fixed kind."""
    return exact.mm(a.dequantized(dtype), b.dequantized(dtype).t())
