"""Quantising to FP8 in plain torch: what Transformer Engine's reference quantisers give, to the bit."""

# m rows, k summed over by the product that reads them

import torch
import torch.nn.functional as F
from torch import Tensor

from prism_kernels.activation import reference as activation
from prism_kernels.fp8 import (
    BLOCK,
    E4M3,
    LARGEST,
    Copies,
    Fp8Activation,
    Quantized,
    Recipe,
    ReduceAmax,
    blocks_of,
    power_of_two_scale,
)
from prism_kernels.norm import reference as norm


def fp8_amax(x: Tensor) -> Tensor:
    """The largest magnitude of a tensor, [] fp32; 0 of an empty one, nan where one is."""
    if not x.numel():
        return torch.zeros((), device=x.device)
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high).float()


def fp8_quantize(
    x: Tensor, recipe: Recipe, dtype: torch.dtype, amax: Tensor | None = None, columns: bool = True
) -> Copies:
    """x [m, k] -> itself, scaled along k, and with `columns` its transpose [k, m], scaled along m.

    amax: tensorwise, that of the whole tensor where x is a part of it.
    """
    if recipe == "blockwise":
        return _by_row_blocks(x, dtype), _by_row_blocks(x.t(), dtype) if columns else None
    return _by_tensor(x, dtype, amax, columns)


def fp8_quantize_weight(weight: Tensor, recipe: Recipe, dtype: torch.dtype, amax: Tensor | None = None) -> Quantized:
    """A weight [n, k] of any strides, or its transpose: blockwise, the same blocks of 128 x 128 serve both."""
    if recipe == "tensorwise":
        return _by_tensor(weight, dtype, amax, columns=False)[0]
    n, k = weight.shape
    rows = F.pad(weight, (0, -k % BLOCK, 0, -n % BLOCK)) if n % BLOCK or k % BLOCK else weight
    tiles = rows.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).float()  # [n / 128, 128, k / 128, 128]
    scale = power_of_two_scale(tiles.abs().amax((1, 3)), dtype)
    data = cast(tiles * scale[:, None, :, None], dtype).flatten(0, 1).flatten(1)[:n, :k]
    return Quantized(data.contiguous(), 1 / scale)


def rms_norm_quantize(
    x: Tensor,
    branch: Tensor | None,
    alpha: float,
    weight: Tensor,
    eps: float,
    recipe: Recipe,
    reduce_amax: ReduceAmax = None,
    columns: bool = True,
) -> tuple[Fp8Activation, Tensor]:
    """(rms_norm(h) in e4m3, h) for h = x + alpha * branch, or x; x, branch [..., d].

    reduce_amax: takes the largest of a tensorwise amax over ranks, in place.
    """
    h = x if branch is None else torch.add(x, branch, alpha=alpha)
    return _quantized(norm.rms_norm(h, weight, eps), recipe, reduce_amax, columns), h


def swiglu_quantize(
    gate_up: Tensor, recipe: Recipe, reduce_amax: ReduceAmax = None, columns: bool = True
) -> Fp8Activation:
    """swiglu(gate_up) in e4m3, [..., 2 f] -> [..., f]."""
    return _quantized(activation.swiglu(gate_up), recipe, reduce_amax, columns)


def squared_relu_quantize(
    x: Tensor, recipe: Recipe, reduce_amax: ReduceAmax = None, columns: bool = True
) -> Fp8Activation:
    """squared_relu(x) in e4m3, [..., f]."""
    return _quantized(activation.squared_relu(x), recipe, reduce_amax, columns)


def _quantized(y: Tensor, recipe: Recipe, reduce_amax: ReduceAmax, columns: bool) -> Fp8Activation:
    rows = y.detach().flatten(0, -2)
    amax = fp8_amax(rows) if recipe == "tensorwise" else None
    if amax is not None and reduce_amax is not None:
        reduce_amax(amax)
    return Fp8Activation(y, *fp8_quantize(rows, recipe, E4M3, amax, columns))


def cast(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    """To the nearest number of the format, ties to even, the largest for what is larger; nan stays nan."""
    largest = LARGEST[dtype]
    return scaled.clamp(-largest, largest).to(dtype)


def _by_tensor(x: Tensor, dtype: torch.dtype, amax: Tensor | None, columns: bool) -> tuple[Quantized, Quantized | None]:
    scale = power_of_two_scale(fp8_amax(x) if amax is None else amax, dtype)
    data = cast(x.float() * scale, dtype).contiguous()
    # torch copies bytes faster than what it takes for numbers.
    transposed = Quantized(data.view(torch.uint8).t().contiguous().view(dtype), 1 / scale) if columns else None
    return Quantized(data, 1 / scale), transposed


def _by_row_blocks(x: Tensor, dtype: torch.dtype) -> Quantized:
    blocks = blocks_of(x).float()
    scale = power_of_two_scale(blocks.abs().amax(-1), dtype)
    data = cast(blocks * scale[..., None], dtype).flatten(1)[:, : x.shape[1]]
    return Quantized(data.contiguous(), 1 / scale)
