"""FP8: the two recipes, scales that are powers of two, and the record of a quantised matrix.

Stateless: a scale follows from the tensor itself. It is a power of two, so that a product of two quantised matrices is
the same number whichever part of a tensor had a scale of its own: tensor parallelism of any degree then agrees to the
last bit, where scales of full precision differ by 3% (subnormal numbers aside). It costs nothing: the error of
quantising a Gaussian tensor is 2.66e-2 beside 2.65e-2.
"""

# m rows, k summed over by the product

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Recipe = Literal["tensorwise", "blockwise"]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
BLOCK = 128  # numbers that share a scale in the blockwise recipe: 1 x 128 of activations, 128 x 128 of weights


def gradient_format(recipe: Recipe) -> torch.dtype:
    """The format of a gradient: e5m2 where one scale spans the whole tensor, e4m3 where blocks have their own."""
    return E5M2 if recipe == "tensorwise" else E4M3


def power_of_two_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """What to multiply numbers up to `amax` by, to fill the format: fp32, a power of two; 1 for 0, inf and nan.

    As Transformer Engine's `compute_scale_from_amax`: the quotient's mantissa is cleared, an overflow is the largest.
    """
    scale = LARGEST[dtype] / amax.float()
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where(amax.isfinite() & (amax > 0), scale, 1.0)


@dataclass(frozen=True)
class Quantized:
    """A matrix in FP8, `data / scale`.

    Quantized(data=float8 [4096, 2048], scale_inv=fp32 [])          # tensorwise
    Quantized(data=float8 [4096, 2048], scale_inv=fp32 [4096, 16])  # 1 x 128: a row's 128 numbers
    Quantized(data=float8 [4096, 2048], scale_inv=fp32 [32, 16])    # 128 x 128
    """

    data: Tensor  # [m, k] float8, contiguous
    scale_inv: Tensor  # fp32, a power of two

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[m, k]: exact in fp32 and in bf16, which hold every number of an FP8 format times a power of two."""
        data = self.data.to(dtype)
        if self.scale_inv.dim() == 0:
            return data.mul_(self.scale_inv.to(dtype))
        m, k = data.shape
        scale = self.scale_inv.to(dtype)
        if len(scale) != m:
            scale = scale.repeat_interleave(BLOCK, 0)[:m]
        if k % BLOCK == 0:
            return data.view(m, -1, BLOCK).mul_(scale[:, :, None]).view(m, k)
        return data.mul_(scale.repeat_interleave(BLOCK, 1)[:, :k])


@dataclass(frozen=True)
class Fp8Activation:
    """What a linear layer reads, quantised where it was computed; a kernel has written it in FP8 only.

    Fp8Activation(x=bf16 [4096, 1, 2048], rows=Quantized [4096, 2048], columns=Quantized [2048, 4096])
    """

    x: Tensor  # stands for it in autograd: its shape, format and gradient. Its numbers are not to be read
    rows: Quantized
    columns: Quantized | None  # the transpose, for the gradient of a weight


Copies = tuple[Quantized, Quantized | None]  # a matrix, and its transpose where that is wanted
ReduceAmax = Callable[[Tensor], None] | None  # takes the largest amax over ranks, in place


def blocks_of(x: Tensor) -> Tensor:
    """[m, k] -> [m, ceil(k / 128), 128], zeros after the end."""
    missing = -x.shape[1] % BLOCK
    return (F.pad(x, (0, missing)) if missing else x).unflatten(1, (-1, BLOCK))
