"""The product of two quantised matrices by other libraries."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from prism_kernels.backends import Uncovered
from prism_kernels.fp8 import E4M3, Quantized


def fp8_linear_by_torch(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """torch's `scaled_mm`: cuBLAS on Hopper, in blocks with CUDA 12.9 and later; oneDNN on a CPU, one scale a tensor.

    Sums of a forward product are the tensor cores' fast ones, as Transformer Engine's are; gradients' are exact.
    """
    (m, k), n = a.data.shape, len(b.data)
    if k % 16 or n % 16:
        raise Uncovered(f"{n} x {k} is no multiple of 16")
    a_type = _scaling(a)
    if a_type != ScalingType.TensorWise and m % 16:
        a = padded(a, -m % 16)
    fast = a.data.is_cuda and a_type == ScalingType.TensorWise and a.data.dtype == E4M3
    y = F.scaled_mm(
        a.data,
        b.data.t(),
        scales(a),
        a_type,
        scales(b),
        _scaling(b),
        output_dtype=dtype,
        use_fast_accum=fast,
    )
    return y[:m]


def _scaling(x: Quantized) -> ScalingType:
    """How torch calls the scales of a matrix."""
    if x.scale_inv.dim() == 0:
        return ScalingType.TensorWise
    if not x.data.is_cuda:
        raise Uncovered("torch multiplies FP8 blocks on a GPU only")
    return ScalingType.BlockWise1x128 if len(x.scale_inv) == len(x.data) else ScalingType.BlockWise128x128


def scales(x: Quantized) -> Tensor:
    """A matrix's scales as cuBLAS wants them to lie: those of a column of blocks, or of a square's row, at 16 bytes.

    1 x 128: [m, k / 128], rows next to each other; 128 x 128: [k / 128, made a multiple of 4, m / 128], likewise.
    """
    if x.scale_inv.dim() == 0:
        return x.scale_inv
    if len(x.scale_inv) == len(x.data):
        return x.scale_inv.t().contiguous().t()
    return F.pad(x.scale_inv, (0, -x.scale_inv.shape[1] % 4)).t()


def padded(x: Quantized, rows: int) -> Quantized:
    """With so many more rows of zeros: the scales of a column of blocks, 4 bytes each, must end at 16."""
    data = F.pad(x.data.view(torch.uint8), (0, 0, 0, rows)).view(x.data.dtype)
    return Quantized(data, F.pad(x.scale_inv, (0, 0, 0, rows), value=1.0))
