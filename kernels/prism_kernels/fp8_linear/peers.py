"""The product of two quantised matrices by other libraries."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from prism_kernels.backends import Uncovered
from prism_kernels.fp8 import BLOCK, E4M3, Quantized


def fp8_linear_by_torch(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """torch's `scaled_mm`: cuBLAS on Hopper, in blocks with CUDA 12.9 and later; oneDNN on a CPU, one scale a tensor.

    Sums of a forward product are the tensor cores' fast ones, as Transformer Engine's are; gradients' are exact.
    """
    if a.data.shape[1] % 16 or b.data.shape[0] % 16:
        raise Uncovered(f"{b.data.shape[0]} x {a.data.shape[1]} is no multiple of 16")
    (a_type, a_scale), (b_type, b_scale) = _scaling(a), _scaling(b)
    fast = a.data.is_cuda and a_type == ScalingType.TensorWise and a.data.dtype == E4M3
    return F.scaled_mm(a.data, b.data.t(), a_scale, a_type, b_scale, b_type, output_dtype=dtype, use_fast_accum=fast)


def _scaling(x: Quantized) -> tuple[ScalingType, Tensor]:
    """How torch calls the scales of a matrix, and the scales as it wants them to lie."""
    if x.scale_inv.dim() == 0:
        return ScalingType.TensorWise, x.scale_inv
    if not x.data.is_cuda:
        raise Uncovered("torch multiplies FP8 blocks on a GPU only")
    if len(x.scale_inv) == len(x.data):
        return ScalingType.BlockWise1x128, x.scale_inv.t().contiguous().t()  # rows next to each other
    k_blocks = -(-x.data.shape[1] // BLOCK)
    rows = F.pad(x.scale_inv, (0, -k_blocks % 4))  # each begins at 16 bytes
    return ScalingType.BlockWise128x128, rows[:, :k_blocks].t()
