"""The causal depthwise convolution of Mamba-2 with SiLU, for packed documents and for one decode step, in Triton.

A program walks down a block of tokens of one document with 256 channels across one warp (16-byte accesses) and keeps
the last three inputs in registers: each input is read, converted and, backward, its pre-activation recomputed once. The
next four rows are loaded before the current four are stored. No block crosses a document (`Boundaries.blocks`), so the
loop has no boundary to check. Backward a program adds up the weight's gradient over all its blocks: the partial sums of
a fixed number of programs are added in a fixed order, without atomics.
"""

# t packed tokens, c channels, k = 4 taps

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.backends import Uncovered
from prism_kernels.boundaries import Boundaries
from prism_kernels.caches import ConvCache

TAPS = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tokens in a block: long enough to amortise the weights (forward) and the three rows read twice (backward).
FORWARD_BLOCK, BACKWARD_BLOCK = 32, 64
# Channels of a one-warp program. Backward holds more per channel (5 sums, 4 weights, 6 rows), hence 4 in a thread.
# From register counts at compile time, not measured: forward takes 136 (15 warps a multiprocessor), backward 203, or
# 160 without a spill when told to (12 warps instead of 9; 144 spills). Per multiprocessor that is 30 KB of loads in
# flight forward and 24 KB backward; 17 KB would hide 700 ns at 3.2 TB/s of reads.
FORWARD_CHANNELS, BACKWARD_CHANNELS = 256, 128
BACKWARD_REGISTERS = 160
BACKWARD_PROGRAMS = 1584  # 12 warps on each of 132 multiprocessors: all run at once


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _load_taps(weight, channels, CHANNELS: tl.constexpr, num_channels):
    """The four taps of each channel, fp32: read as they lie, 8 bytes a channel, and split in registers."""
    taps = tl.arange(0, 4)
    both = tl.load(weight + channels[:, None] * 4 + taps, mask=channels[:, None] < num_channels, other=0.0)
    even, odd = tl.split(tl.reshape(both.to(tl.float32), (CHANNELS, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def _load_rows(x, row, end, stride, inside):
    """Rows row to row + 3 in their own dtype; zeros from `end` on."""
    a = tl.load(x + row * stride, mask=inside & (row < end), other=0.0)
    b = tl.load(x + (row + 1) * stride, mask=inside & (row + 1 < end), other=0.0)
    c = tl.load(x + (row + 2) * stride, mask=inside & (row + 2 < end), other=0.0)
    d = tl.load(x + (row + 3) * stride, mask=inside & (row + 3 < end), other=0.0)
    return a, b, c, d


@triton.jit
def _load_before(
    x, initial, row, start, document, stride, channels, num_channels, BACK: tl.constexpr, INITIAL: tl.constexpr
):
    """The input BACK rows before a block's first row, fp32: a row of the document, or of what came before it."""
    inside = channels < num_channels
    value = tl.load(x + (row - BACK) * stride, mask=inside & (row - BACK >= start), other=0.0).to(tl.float32)
    if INITIAL:
        place = (document * num_channels + channels) * 3 + 3 - BACK
        value += tl.load(initial + place, mask=inside & (row == start), other=0.0).to(tl.float32)
    return value


@triton.jit
def _convolve(a, b, c, d, w0, w1, w2, w3, bias):
    return bias + w0 * a + w1 * b + w2 * c + w3 * d


@triton.jit
def _forward_kernel(
    x, weight, bias, initial, blocks, y, num_channels, stride,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
    SILU: tl.constexpr, BIAS: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    stride = tl.cast(stride, tl.int64) * UNIT
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channels < num_channels
    blocks += 4 * tl.program_id(1)
    first, start = tl.load(blocks).to(tl.int64), tl.load(blocks + 1).to(tl.int64)
    end = tl.minimum(first + BLOCK, tl.load(blocks + 2).to(tl.int64))
    document = tl.load(blocks + 3).to(tl.int64)
    x += channels
    y += channels
    e, f, g, h = _load_rows(x, first, end, stride, inside)
    a = _load_before(x, initial, first, start, document, stride, channels, num_channels, 3, INITIAL)
    b = _load_before(x, initial, first, start, document, stride, channels, num_channels, 2, INITIAL)
    c = _load_before(x, initial, first, start, document, stride, channels, num_channels, 1, INITIAL)
    w0, w1, w2, w3 = _load_taps(weight, channels, CHANNELS, num_channels)
    offset = tl.zeros((CHANNELS,), tl.float32)
    if BIAS:
        offset = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    for row in range(first, end, 4):
        d, p, q, r = e.to(tl.float32), f.to(tl.float32), g.to(tl.float32), h.to(tl.float32)
        e, f, g, h = _load_rows(x, row + 4, end, stride, inside)
        y0 = _convolve(a, b, c, d, w0, w1, w2, w3, offset)
        y1 = _convolve(b, c, d, p, w0, w1, w2, w3, offset)
        y2 = _convolve(c, d, p, q, w0, w1, w2, w3, offset)
        y3 = _convolve(d, p, q, r, w0, w1, w2, w3, offset)
        a, b, c = p, q, r
        if SILU:
            y0, y1, y2, y3 = _silu(y0), _silu(y1), _silu(y2), _silu(y3)
        at = y + row * num_channels
        tl.store(at, y0.to(y.dtype.element_ty), mask=inside)
        tl.store(at + num_channels, y1.to(y.dtype.element_ty), mask=inside & (row + 1 < end))
        tl.store(at + 2 * num_channels, y2.to(y.dtype.element_ty), mask=inside & (row + 2 < end))
        tl.store(at + 3 * num_channels, y3.to(y.dtype.element_ty), mask=inside & (row + 3 < end))


@triton.jit
def _gradient_before_silu(grad, a, b, c, d, w0, w1, w2, w3, bias, SILU: tl.constexpr):
    grad = grad.to(tl.float32)
    if SILU:
        x = _convolve(a, b, c, d, w0, w1, w2, w3, bias)
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        grad *= sigmoid * (1.0 + x * (1.0 - sigmoid))
    return grad


@triton.jit
def _store_gradient(
    value, grad_x, grad_initial, row, first, start, end, document, channels, num_channels, INITIAL: tl.constexpr
):
    """Row `row` of the input's gradient, where the block owns it; before the document, of the initial state's."""
    inside = channels < num_channels
    place = grad_x + row * num_channels + channels
    tl.store(place, value.to(grad_x.dtype.element_ty), mask=inside & (row >= first) & (row < end))
    if INITIAL:
        place = grad_initial + (document * num_channels + channels) * 3 + 3 + row - start
        tl.store(place, value.to(grad_initial.dtype.element_ty), mask=inside & (row < start))


@triton.jit
def _backward_kernel(
    grad, x, weight, bias, initial, blocks, grad_x, grad_initial, partial, num_channels, num_blocks,
    grad_stride, stride, GRAD_UNIT: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
    SILU: tl.constexpr, BIAS: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    grad_stride, stride = tl.cast(grad_stride, tl.int64) * GRAD_UNIT, tl.cast(stride, tl.int64) * UNIT
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channels < num_channels
    x += channels
    grad += channels
    w0, w1, w2, w3 = _load_taps(weight, channels, CHANNELS, num_channels)
    zero = tl.zeros((CHANNELS,), tl.float32)
    offset = zero
    if BIAS:
        offset = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    sum0, sum1, sum2, sum3, total = zero, zero, zero, zero, zero
    for i in range(tl.program_id(1), num_blocks, tl.num_programs(1)):
        first, start = tl.load(blocks + 4 * i).to(tl.int64), tl.load(blocks + 4 * i + 1).to(tl.int64)
        last = tl.load(blocks + 4 * i + 2).to(tl.int64)
        end = tl.minimum(first + BLOCK, last)
        document = tl.load(blocks + 4 * i + 3).to(tl.int64)
        x0, x1, x2, x3 = _load_rows(x, first, last, stride, inside)
        d0, d1, d2, d3 = _load_rows(grad, first, last, grad_stride, inside)
        a = _load_before(x, initial, first, start, document, stride, channels, num_channels, 3, INITIAL)
        b = _load_before(x, initial, first, start, document, stride, channels, num_channels, 2, INITIAL)
        c = _load_before(x, initial, first, start, document, stride, channels, num_channels, 1, INITIAL)
        ga, gb, gc = zero, zero, zero
        # Row r completes the gradient of row r - 3: three rows after the block's last are met, too.
        for row in range(first, end + 3, 4):
            d, e, f, g = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
            g0 = _gradient_before_silu(d0, a, b, c, d, w0, w1, w2, w3, offset, SILU)
            g1 = _gradient_before_silu(d1, b, c, d, e, w0, w1, w2, w3, offset, SILU)
            g2 = _gradient_before_silu(d2, c, d, e, f, w0, w1, w2, w3, offset, SILU)
            g3 = _gradient_before_silu(d3, d, e, f, g, w0, w1, w2, w3, offset, SILU)
            x0, x1, x2, x3 = _load_rows(x, row + 4, last, stride, inside)
            d0, d1, d2, d3 = _load_rows(grad, row + 4, last, grad_stride, inside)
            dx0 = w3 * ga + w2 * gb + w1 * gc + w0 * g0
            dx1 = w3 * gb + w2 * gc + w1 * g0 + w0 * g1
            dx2 = w3 * gc + w2 * g0 + w1 * g1 + w0 * g2
            dx3 = w3 * g0 + w2 * g1 + w1 * g2 + w0 * g3
            ga, gb, gc = g1, g2, g3
            _store_gradient(
                dx0, grad_x, grad_initial, row - 3, first, start, end, document, channels, num_channels, INITIAL
            )
            _store_gradient(
                dx1, grad_x, grad_initial, row - 2, first, start, end, document, channels, num_channels, INITIAL
            )
            _store_gradient(
                dx2, grad_x, grad_initial, row - 1, first, start, end, document, channels, num_channels, INITIAL
            )
            _store_gradient(
                dx3, grad_x, grad_initial, row, first, start, end, document, channels, num_channels, INITIAL
            )
            g0 = tl.where(row < end, g0, 0.0)  # the next block's rows are counted there
            g1 = tl.where(row + 1 < end, g1, 0.0)
            g2 = tl.where(row + 2 < end, g2, 0.0)
            g3 = tl.where(row + 3 < end, g3, 0.0)
            sum0 += g0 * a + g1 * b + g2 * c + g3 * d
            sum1 += g0 * b + g1 * c + g2 * d + g3 * e
            sum2 += g0 * c + g1 * d + g2 * e + g3 * f
            sum3 += g0 * d + g1 * e + g2 * f + g3 * g
            total += g0 + g1 + g2 + g3
            a, b, c = e, f, g
    partial += tl.program_id(1).to(tl.int64) * 5 * num_channels + channels
    tl.store(partial, sum0, mask=inside)
    tl.store(partial + num_channels, sum1, mask=inside)
    tl.store(partial + 2 * num_channels, sum2, mask=inside)
    tl.store(partial + 3 * num_channels, sum3, mask=inside)
    if BIAS:
        tl.store(partial + 4 * num_channels, total, mask=inside)


@triton.jit
def _sum_kernel(
    partial, grad_weight, grad_bias, num_partials, num_channels, PARTIALS: tl.constexpr, CHANNELS: tl.constexpr
):
    """partial [partials, 5, c] -> grad_weight [c, 4], grad_bias [c]: program (channel block, tap; 4 is the bias)."""
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    tap = tl.program_id(1)
    inside = channels < num_channels
    rows = tl.arange(0, PARTIALS)
    total = tl.zeros((PARTIALS, CHANNELS), tl.float32)
    for first in range(0, num_partials, PARTIALS):
        place = ((first + rows[:, None]) * 5 + tap) * num_channels + channels
        total += tl.load(partial + place, mask=(first + rows[:, None] < num_partials) & inside, other=0.0)
    value = tl.sum(total, 0)
    if tap < 4:
        tl.store(grad_weight + channels * 4 + tap, value.to(grad_weight.dtype.element_ty), mask=inside)
    elif grad_bias is not None:
        tl.store(grad_bias + channels, value.to(grad_bias.dtype.element_ty), mask=inside)


def _row_stride(x: Tensor) -> tuple[int, int]:
    """(stride in units, unit): Triton knows only multiples of 16 to be aligned, 8 elements of bf16 are enough."""
    unit = 8 if x.stride(0) % 8 == 0 else 1
    return x.stride(0) // unit, unit


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial, boundaries, silu):
        x, weight = x if x.stride(-1) == 1 else x.contiguous(), weight.contiguous()
        initial = None if initial is None else initial.contiguous()
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        blocks, (stride, unit) = boundaries.blocks(FORWARD_BLOCK), _row_stride(x)
        grid = (triton.cdiv(x.shape[1], FORWARD_CHANNELS), len(blocks))
        _forward_kernel[grid](
            x, weight, bias, initial, blocks, y, x.shape[1], stride,
            UNIT=unit, BLOCK=FORWARD_BLOCK, CHANNELS=FORWARD_CHANNELS,
            SILU=silu, BIAS=bias is not None, INITIAL=initial is not None, num_warps=1,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, initial)
        ctx.boundaries, ctx.silu = boundaries, silu
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, initial = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        grad_x, grad_weight = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)
        grad_bias = None if bias is None else torch.empty_like(bias)
        grad_initial = None if initial is None else torch.zeros_like(initial)
        blocks, c = ctx.boundaries.blocks(BACKWARD_BLOCK), x.shape[1]
        across = triton.cdiv(c, BACKWARD_CHANNELS)
        down = min(len(blocks), max(1, BACKWARD_PROGRAMS // across))
        partial = x.new_empty(down, TAPS + 1, c, dtype=torch.float32)
        (grad_stride, grad_unit), (stride, unit) = _row_stride(grad), _row_stride(x)
        _backward_kernel[(across, down)](
            grad, x, weight, bias, initial, blocks, grad_x, grad_initial, partial, c, len(blocks),
            grad_stride, stride, GRAD_UNIT=grad_unit, UNIT=unit, BLOCK=BACKWARD_BLOCK, CHANNELS=BACKWARD_CHANNELS,
            SILU=ctx.silu, BIAS=bias is not None, INITIAL=initial is not None, num_warps=1,
            maxnreg=BACKWARD_REGISTERS if initial is None else None,
        )  # fmt: skip
        sums = TAPS if bias is None else TAPS + 1
        _sum_kernel[(triton.cdiv(c, 64), sums)](
            partial, grad_weight, grad_bias, down, c, PARTIALS=16, CHANNELS=64, num_warps=4
        )
        return grad_x, grad_weight, grad_bias, grad_initial, None, None


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> None:
    if weight.shape[1] != TAPS:
        raise Uncovered(f"{weight.shape[1]} taps: needs {TAPS}")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("state", state)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise Uncovered(f"{name} in {tensor.dtype}: needs float32, bfloat16 or float16")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    boundaries: Boundaries,
    silu: bool = True,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution within each document: y_i = silu(bias + sum_j weight[:, j] x[i - 3 + j]).

    x: [t, c], rows any distance apart, weight: [c, 4], bias: [c]; initial_state: [documents, c, 3], what came before
    each document (zeros where None). Returns y [t, c] and, on request, the final state [documents, c, 3].
    """
    boundaries.check(x=x)
    _check(x, weight, bias, initial_state)
    y = _CausalConv1d.apply(x, weight, bias, initial_state, boundaries, silu)
    return (y, _final_inputs(x, initial_state, boundaries)) if return_final_state else y


def _final_inputs(x: Tensor, initial: Tensor | None, boundaries: Boundaries) -> Tensor:
    """[documents, c, 3]: the last inputs of each document, reaching back into what came before it."""
    rows, missing = boundaries.last_rows(TAPS - 1)
    last = x[rows if missing is None else rows.clamp(max=len(x) - 1)]
    if missing is not None:
        before = torch.zeros_like(last)
        if initial is not None:
            before = initial.transpose(1, 2).to(x.dtype).gather(1, rows.clamp(max=2)[..., None].expand_as(last))
        last = torch.where(missing[..., None], before, last)
    return last.transpose(1, 2).contiguous()


@triton.jit
def _step_kernel(
    x, weight, bias, state, slots, y, num_channels, stride,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channels < num_channels
    state += (tl.load(slots + row) * num_channels + channels) * 3
    a = tl.load(state, mask=inside, other=0.0)
    b = tl.load(state + 1, mask=inside, other=0.0)
    c = tl.load(state + 2, mask=inside, other=0.0)
    d = tl.load(x + row * stride * UNIT + channels, mask=inside, other=0.0)
    w0, w1, w2, w3 = _load_taps(weight, channels, CHANNELS, num_channels)
    offset = tl.zeros((CHANNELS,), tl.float32)
    if BIAS:
        offset = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    d32 = d.to(tl.float32)
    value = _convolve(a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d32, w0, w1, w2, w3, offset)
    if SILU:
        value = _silu(value)
    tl.store(y + row * num_channels + channels, value.to(y.dtype.element_ty), mask=inside)
    tl.store(state, b, mask=inside)
    tl.store(state + 1, c, mask=inside)
    tl.store(state + 2, d32.to(state.dtype.element_ty), mask=inside)


def conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, cache: ConvCache, slots: Tensor, silu: bool = True
) -> Tensor:
    """`causal_conv1d` of one token for each row: x [b, c] -> [b, c]; the rows' slots [b] int64 of the cache move on."""
    _check(x, weight, bias, cache.state)
    if not cache.state.is_contiguous():
        raise Uncovered("a cache that is not contiguous")
    x = x if x.stride(-1) == 1 else x.contiguous()
    y, (stride, unit) = torch.empty_like(x, memory_format=torch.contiguous_format), _row_stride(x)
    rows, c = x.shape
    _step_kernel[(triton.cdiv(c, 256), rows)](
        x, weight.contiguous(), bias, cache.state, slots, y, c, stride,
        UNIT=unit, CHANNELS=256, SILU=silu, BIAS=bias is not None, num_warps=2,
    )  # fmt: skip
    return y
