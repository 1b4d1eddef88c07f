"""Quantising to FP8 in one pass over a matrix, with its transposed copy, or over what the matrix is made from.

The numbers of reference.py, to the bit. A norm's or an activation's result is quantised where it is computed, tile by
tile: it is never written in bf16. Tensorwise that is a pass for its amax and one for the casts, both over its input.
"""

# m rows, k columns

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.activation import triton as activation
from prism_kernels.backends import Uncovered
from prism_kernels.fp8 import BLOCK, E4M3, LARGEST, Copies, Fp8Activation, Quantized, Recipe, ReduceAmax
from prism_kernels.norm import triton as norm
from prism_kernels.quantize.scales import magnitude, narrowed, scale_of
from prism_kernels.rows import as_rows, check_dtypes, multiple

FORMATS = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}
PLAIN, NORM, SWIGLU, SQUARED_RELU = 0, 1, 2, 3  # what is quantised: x, or what is made from it
TENSOR, ROW, TILE = 0, 1, 2  # what shares a scale: everything, 128 numbers of a row (or of a column), 128 x 128


@triton.jit
def produced(x, inverse, weight, rows, columns, m, k, x_stride, KIND: tl.constexpr):
    """What is quantised at [rows, columns], rounded as the op by itself would store it; fp32, 0 outside."""
    here = (rows < m) & (columns < k)
    place = x + rows * x_stride + columns
    value = tl.load(place, mask=here, other=0.0).to(tl.float32)
    if KIND == 1:  # NORM
        scale = tl.load(inverse + rows, mask=rows < m, other=0.0)
        weights = tl.load(weight + columns, mask=columns < k, other=0.0).to(tl.float32)
        value = (value * scale).to(x.dtype.element_ty).to(tl.float32) * weights
    elif KIND == 2:  # SWIGLU
        up = tl.load(place + k, mask=here, other=0.0).to(tl.float32)
        value = value * tl.sigmoid(value) * up
    elif KIND == 3:  # SQUARED_RELU
        positive = tl.where(value < 0, 0.0, value)
        value = positive * positive
    return value.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def amax_kernel(
    x, out, m, k, x_stride, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MULTIPLE: tl.constexpr
):
    """out [] int32, zero before: the largest magnitude's bits."""
    x_stride = x_stride // MULTIPLE * MULTIPLE
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    largest = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(0, k, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)[None, :]
        value = produced(x, x, x, rows, columns, m, k, x_stride, KIND)
        largest = tl.maximum(largest, magnitude(value))
    tl.atomic_max(out, tl.max(tl.max(largest, 1), 0))


@triton.jit
def quantize_kernel(
    x,
    inverse,
    weight,
    amax,
    row_data,
    row_scale,
    column_data,
    column_scale,
    m,
    k,
    x_stride,
    KIND: tl.constexpr,
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
    value = produced(x, inverse, weight, rows[:, None], columns[None, :], m, k, x_stride, KIND)
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
    return _amax(_readable(x)[0], PLAIN)


def _amax(x: Tensor, kind: int) -> Tensor:
    check_dtypes(x=x)
    out = torch.zeros((), dtype=torch.int32, device=x.device)
    m, k = x.shape[0], x.shape[1] // (2 if kind == SWIGLU else 1)
    if x.numel():
        rows, columns = (4, 1024) if k >= 1024 else (32, 128)
        stride = x.stride(0)
        amax_kernel[(triton.cdiv(m, rows),)](
            x, out, m, k, stride, KIND=kind, ROWS=rows, COLUMNS=columns, MULTIPLE=multiple(stride), num_warps=4
        )
    return out.view(torch.float32)


def fp8_quantize(
    x: Tensor, recipe: Recipe, dtype: torch.dtype, amax: Tensor | None = None, columns: bool = True
) -> Copies:
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
    """(rms_norm(h) in e4m3, h) for h = x + alpha * branch, or x; see reference.py."""
    with torch.no_grad():
        copies, h, inverse = _norm(x, branch, alpha, weight, eps, recipe, reduce_amax, columns)
    if branch is None:
        return Fp8Activation(_NormHandle.apply(x, weight, inverse), *copies), x
    handle, h = _AddNormHandle.apply(x, branch, alpha, weight, (h, inverse))
    return Fp8Activation(handle, *copies), h


def _norm(
    x: Tensor,
    branch: Tensor | None,
    alpha: float,
    weight: Tensor,
    eps: float,
    recipe: Recipe,
    reduce_amax: ReduceAmax,
    columns: bool,
) -> tuple[Copies, Tensor, Tensor]:
    """(copies of rms_norm(h), rows of h, 1 / rms of h)."""
    rows, weight = as_rows(x), norm.checked(x, weight)
    if weight.dtype != x.dtype:
        raise Uncovered(f"x is {x.dtype} and weight {weight.dtype}: needs one format")
    amax = torch.zeros((), dtype=torch.int32, device=x.device) if recipe == "tensorwise" else None
    added = None if branch is None else as_rows(branch)
    _, h, inverse = norm.norm_forward(rows, added, alpha, weight, eps, store=False, amax=amax)
    if amax is not None and reduce_amax is not None:
        reduce_amax(amax.view(torch.float32))
    shared = ROW if amax is None else TENSOR
    copies = _launch(h, E4M3, shared, kind=NORM, amax=amax, inverse=inverse, weight=weight, columns=columns)
    return copies, h, inverse


def swiglu_quantize(
    gate_up: Tensor, recipe: Recipe, reduce_amax: ReduceAmax = None, columns: bool = True
) -> Fp8Activation:
    """swiglu(gate_up) in e4m3; see reference.py."""
    with torch.no_grad():
        copies = _activation(gate_up, SWIGLU, recipe, reduce_amax, columns)
    return Fp8Activation(_SwiGLUHandle.apply(gate_up), *copies)


def squared_relu_quantize(
    x: Tensor, recipe: Recipe, reduce_amax: ReduceAmax = None, columns: bool = True
) -> Fp8Activation:
    """squared_relu(x) in e4m3; see reference.py."""
    with torch.no_grad():
        copies = _activation(x, SQUARED_RELU, recipe, reduce_amax, columns)
    return Fp8Activation(_SquaredReLUHandle.apply(x), *copies)


def _handle(x: Tensor, *shape: int) -> Tensor:
    """One element, to stand for a tensor of this shape in autograd."""
    return x.new_zeros(1).expand(shape)


class _NormHandle(norm._RMSNorm):
    """What stands for a norm's result; backward is the norm's."""

    @staticmethod
    def forward(ctx, x, weight, inverse):
        ctx.save_for_backward(x, weight, inverse)
        return _handle(x, *x.shape)


class _AddNormHandle(norm._AddRMSNorm):
    @staticmethod
    def forward(ctx, x, branch, alpha, weight, made):
        ctx.save_for_backward(made[0], weight, made[1])
        ctx.alpha, ctx.shape = alpha, x.shape
        return _handle(x, *x.shape), made[0].view(x.shape)


class _SwiGLUHandle(activation._SwiGLU):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return _handle(gate_up, *gate_up.shape[:-1], gate_up.shape[-1] // 2)


class _SquaredReLUHandle(activation._SquaredReLU):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _handle(x, *x.shape)


def _activation(x: Tensor, kind: int, recipe: Recipe, reduce_amax: ReduceAmax, columns: bool) -> Copies:
    rows = as_rows(x)
    if recipe == "blockwise":
        return _launch(rows, E4M3, ROW, kind=kind, columns=columns)
    amax = _amax(rows, kind)
    if reduce_amax is not None:
        reduce_amax(amax)
    return _launch(rows, E4M3, TENSOR, kind=kind, amax=amax, columns=columns)


def _launch(
    x: Tensor,
    dtype: torch.dtype,
    shared: int,
    *,
    columns: bool,
    kind: int = PLAIN,
    amax: Tensor | None = None,
    inverse: Tensor | None = None,
    weight: Tensor | None = None,
) -> Copies:
    """A transposed matrix is read as it lies, and what was asked for is what the kernel calls its columns."""
    check_dtypes(x=x)
    readable, transposed = _readable(x)
    if transposed and (columns or shared == ROW):
        raise Uncovered("a transposed matrix is quantised with a scale of its own or in tiles only")
    m, k = readable.shape[0], readable.shape[1] // (2 if kind == SWIGLU else 1)
    by_row = None if transposed else _empty(m, k, dtype, shared, x.device)
    by_column = _empty(k, m, dtype, shared, x.device) if transposed or columns else None
    if shared == TENSOR and by_row and by_column:
        by_column = Quantized(by_column.data, by_row.scale_inv)
    if x.numel():
        first, last = by_row or by_column, by_column or by_row
        assert first is not None and last is not None
        quantize_kernel[(triton.cdiv(m, BLOCK), triton.cdiv(k, BLOCK))](
            readable,
            inverse,
            weight,
            None if amax is None else amax.view(torch.int32),
            first.data,
            first.scale_inv,
            last.data,
            last.scale_inv,
            m,
            k,
            readable.stride(0),
            KIND=kind,
            SHARED=shared,
            ROWS=by_row is not None,
            COLUMNS=by_column is not None,
            LARGEST=LARGEST[dtype],
            FORMAT=FORMATS[dtype],
            BLOCK=BLOCK,
            MULTIPLE=multiple(readable.stride(0)),
            num_warps=8,
        )
    if by_row is None:
        assert by_column is not None
        return by_column, None
    return by_row, by_column


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
