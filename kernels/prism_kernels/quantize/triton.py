"""Quantising to FP8 in one pass over a matrix, with its transposed copy; the numbers of reference.py, to the bit."""

# m rows, k columns

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.backends import Uncovered
from prism_kernels.fp8 import BLOCK, LARGEST, Quantized, Recipe
from prism_kernels.rows import check_dtypes, multiple

FORMATS = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}
TENSOR, ROW, TILE = 0, 1, 2  # what shares a scale: everything, 128 numbers of a row (or of a column), 128 x 128


@triton.jit
def magnitude(x):
    """|x| of fp32 as the integer of its bits, by which it is ordered: infinity above all numbers, nan above that."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def scale_of(bits, LARGEST: tl.constexpr):
    """prism_kernels.fp8.power_of_two_scale of magnitudes given as bits."""
    amax = bits.to(tl.float32, bitcast=True)
    quotient = tl.minimum(tl.div_rn(LARGEST, tl.where(bits == 0, 1.0, amax)), 3.4028234663852886e38)
    scale = (quotient.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where((bits > 0) & (bits < 0x7F800000), scale, 1.0)


@triton.jit
def narrowed(x, LARGEST: tl.constexpr, FORMAT: tl.constexpr):
    """fp32 to the nearest number of the format, the largest for what is larger, nan for nan."""
    inside = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return inside.to(FORMAT)


@triton.jit
def amax_kernel(x, out, m, k, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MULTIPLE: tl.constexpr):
    """out [] int32, zero before: the largest magnitude's bits."""
    x_stride = x_stride // MULTIPLE * MULTIPLE
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    largest = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(0, k, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)[None, :]
        value = tl.load(x + rows * x_stride + columns, mask=(rows < m) & (columns < k), other=0.0)
        largest = tl.maximum(largest, magnitude(value.to(tl.float32)))
    tl.atomic_max(out, tl.max(tl.max(largest, 1), 0))


@triton.jit
def quantize_kernel(
    x,
    amax,
    row_data,
    row_scale,
    column_data,
    column_scale,
    m,
    k,
    x_stride,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """A tile of x to row_data [m, k] with ROWS, and to column_data [k, m] with COLUMNS; scales are stored inverted."""
    x_stride = x_stride // MULTIPLE * MULTIPLE
    m_block, k_block = tl.program_id(0), tl.program_id(1)
    rows = (m_block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    columns = (k_block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    here = (rows < m)[:, None] & (columns < k)[None, :]
    value = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=here, other=0.0).to(tl.float32)
    if SHARED == 0:  # TENSOR
        scale = scale_of(tl.load(amax), LARGEST)
        by_row = value * scale
        by_column = by_row
        if (m_block == 0) & (k_block == 0):
            tl.store(row_scale, 1.0 / scale)
    elif SHARED == 1:  # ROW
        bits = magnitude(value)
        if ROWS:
            scale = scale_of(tl.max(bits, 1), LARGEST)
            by_row = value * scale[:, None]
            tl.store(row_scale + rows * tl.cdiv(k, BLOCK) + k_block, 1.0 / scale, mask=rows < m)
        if COLUMNS:
            scale = scale_of(tl.max(bits, 0), LARGEST)
            by_column = value * scale[None, :]
            tl.store(column_scale + columns * tl.cdiv(m, BLOCK) + m_block, 1.0 / scale, mask=columns < k)
    else:  # TILE
        scale = scale_of(tl.max(tl.max(magnitude(value), 1), 0), LARGEST)
        by_row = value * scale
        by_column = by_row
        if ROWS:
            tl.store(row_scale + m_block * tl.cdiv(k, BLOCK) + k_block, 1.0 / scale)
        if COLUMNS:
            tl.store(column_scale + k_block * tl.cdiv(m, BLOCK) + m_block, 1.0 / scale)
    if ROWS:
        data = narrowed(by_row, LARGEST, FORMAT)
        tl.store(row_data + rows[:, None] * k + columns[None, :], data, mask=here)
    if COLUMNS:
        data = tl.trans(narrowed(by_column, LARGEST, FORMAT))
        tl.store(column_data + columns[:, None] * m + rows[None, :], data, mask=tl.trans(here))


def fp8_amax(x: Tensor) -> Tensor:
    """The largest magnitude of a tensor, [] fp32; 0 of an empty one, nan where one is."""
    check_dtypes(x=x)
    out = torch.zeros((), dtype=torch.int32, device=x.device)
    x, _ = _readable(x)
    if x.numel():
        m, k = x.shape
        rows, columns = (4, 1024) if k >= 1024 else (32, 128)
        amax_kernel[(triton.cdiv(m, rows),)](
            x, out, m, k, x.stride(0), ROWS=rows, COLUMNS=columns, MULTIPLE=multiple(x.stride(0)), num_warps=4
        )
    return out.view(torch.float32)


def fp8_quantize(
    x: Tensor, recipe: Recipe, dtype: torch.dtype, amax: Tensor | None = None, columns: bool = True
) -> tuple[Quantized, Quantized | None]:
    """x [m, k] -> itself, scaled along k, and with `columns` its transpose [k, m], scaled along m; see reference.py."""
    if recipe == "tensorwise":
        return _launch(x, dtype, TENSOR, amax=fp8_amax(x) if amax is None else amax, columns=columns)
    return _launch(x, dtype, ROW, columns=columns)


def fp8_quantize_weight(weight: Tensor, recipe: Recipe, dtype: torch.dtype, amax: Tensor | None = None) -> Quantized:
    """A weight [n, k] of any strides, or its transpose; see reference.py."""
    shared = TILE
    if recipe == "tensorwise":
        shared, amax = TENSOR, fp8_amax(weight) if amax is None else amax
    return _launch(weight, dtype, shared, amax=amax, columns=False)[0]


def _launch(
    x: Tensor, dtype: torch.dtype, shared: int, *, amax: Tensor | None = None, columns: bool
) -> tuple[Quantized, Quantized | None]:
    """A transposed matrix is read as it lies, and what was asked for is what the kernel calls its columns."""
    check_dtypes(x=x)
    readable, transposed = _readable(x)
    if transposed and (columns or shared == ROW):
        raise Uncovered("a transposed matrix is quantised with a scale of its own or in tiles only")
    m, k = readable.shape
    by_row = None if transposed else _empty(m, k, dtype, shared, x.device)
    by_column = _empty(k, m, dtype, shared, x.device) if transposed or columns else None
    if shared == TENSOR and by_row and by_column:
        by_column = Quantized(by_column.data, by_row.scale_inv)
    if x.numel():
        first, last = by_row or by_column, by_column or by_row
        assert first is not None and last is not None
        quantize_kernel[(triton.cdiv(m, BLOCK), triton.cdiv(k, BLOCK))](
            readable,
            None if amax is None else amax.view(torch.int32),
            first.data,
            first.scale_inv,
            last.data,
            last.scale_inv,
            m,
            k,
            readable.stride(0),
            SHARED=shared,
            ROWS=by_row is not None,
            COLUMNS=by_column is not None,
            LARGEST=LARGEST[dtype],
            FORMAT=FORMATS[dtype],
            BLOCK=BLOCK,
            MULTIPLE=multiple(readable.stride(0)),
            num_warps=8,
        )
    return (by_column, None) if transposed else (by_row, by_column)


def _empty(n: int, width: int, dtype: torch.dtype, shared: int, device: torch.device) -> Quantized:
    blocks = triton.cdiv(width, BLOCK)
    scales = {TENSOR: (), ROW: (n, blocks), TILE: (triton.cdiv(n, BLOCK), blocks)}[shared]
    data = torch.empty(n, width, dtype=dtype, device=device)
    return Quantized(data, torch.empty(scales, dtype=torch.float32, device=device))


def _readable(x: Tensor) -> tuple[Tensor, bool]:
    """(the matrix, or its transpose where its columns lie next to each other; which of the two)."""
    x = x.flatten(0, -2) if x.dim() > 2 else x.reshape(1, -1) if x.dim() < 2 else x
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x, False
    if x.stride(0) == 1:
        return x.t(), True
    return x.contiguous(), False
