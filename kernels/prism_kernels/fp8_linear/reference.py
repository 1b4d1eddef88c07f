"""The product of two quantised matrices, dequantised: exact operands, fp32 sums, rounded once."""

import torch
from torch import Tensor

from prism_kernels import matmul
from prism_kernels.fp8 import Quantized


def fp8_linear(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """a [m, k], b [n, k] -> a @ b.T [m, n] of `dtype`; forward, and either gradient, of a linear layer.

    Dequantised operands are exact in bf16 as in fp32, and a power of two moves no bit of a partial sum: this is
    Transformer Engine's (qa @ qb.T) * (scale_a * scale_b) in fp32, rounded once, whatever the order of sums.
    """
    return matmul.mm(a.dequantized(dtype), b.dequantized(dtype).t())
