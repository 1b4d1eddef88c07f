"""The depthwise causal convolution in plain torch, of packed documents and of one token of each running sequence."""

# t packed tokens, b rows of a decode step, c channels, k taps

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from prism_kernels.boundaries import Boundaries
from prism_kernels.caches import ConvCache
from prism_kernels.precision import accumulate_dtype


class _CausalConv1d(torch.autograd.Function):
    """Works on rows [b, L, c] in the accumulation dtype: what is before each of the b rows is zero."""

    @staticmethod
    def forward(ctx, x, weight, bias, initial, boundaries, silu):
        ctx.save_for_backward(x, weight, bias, initial)
        ctx.boundaries, ctx.silu = boundaries, silu
        y = _shifted_products(_conv_rows(x, weight, initial, boundaries), weight, bias)
        return _conv_tokens(F.silu(y, inplace=True) if silu else y, x, weight, initial, boundaries)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, initial = ctx.saved_tensors
        boundaries, taps = ctx.boundaries, weight.shape[1]
        rows = _conv_rows(x, weight, initial, boundaries)
        grad = _conv_rows(grad, weight, None if initial is None else torch.zeros_like(initial), boundaries)
        if ctx.silu:
            grad = torch.ops.aten.silu_backward(grad, _shifted_products(rows, weight, bias))
        by_tap = weight.t().contiguous().to(grad.dtype)  # strided rows would cost 7x
        grad_rows = grad * by_tap[taps - 1]
        sums = [(grad * rows).sum((0, 1))]
        for shift in range(1, taps):
            late, early = grad[:, shift:], rows[:, : rows.shape[1] - shift]
            grad_rows[:, : late.shape[1]].addcmul_(late, by_tap[taps - 1 - shift])
            sums.append((late * early).sum((0, 1)))
        grad_weight = torch.stack(sums[::-1], 1).to(weight.dtype)
        grad_bias = None if bias is None else grad.sum((0, 1)).to(bias.dtype)
        grad_initial = None
        if initial is not None:
            grad_initial = torch.zeros_like(initial)
            _, history = boundaries.history_slots(taps - 1)
            grad_initial[boundaries.document_rows] = grad_rows[0, history].transpose(1, 2).to(initial.dtype)
        grad_x = _conv_tokens(grad_rows, x, weight, initial, boundaries)
        return grad_x, grad_weight, grad_bias, grad_initial, None, None


def _shifted_products(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """bias + sum over taps of weight * rows shifted: k elementwise products beat F.conv1d's depthwise backward 3x."""
    taps, by_tap = weight.shape[1], weight.t().contiguous().to(rows.dtype)
    y = rows * by_tap[-1] if bias is None else torch.addcmul(bias.to(rows.dtype), rows, by_tap[-1])
    for shift in range(1, min(taps, rows.shape[1])):
        y[:, shift:].addcmul_(rows[:, :-shift], by_tap[taps - 1 - shift])
    return y


def _conv_rows(x: Tensor, weight: Tensor, initial: Tensor | None, boundaries: Boundaries) -> Tensor:
    """[t, c] -> [documents, length, c], a view where x is in the accumulation dtype; where lengths differ or there is
    a state, one row [1, ., c] in which k - 1 rows (the state, or zeros) come before each document."""
    x = x.to(accumulate_dtype(x.dtype))
    if boundaries.uniform_len and initial is None:
        return x.unflatten(0, (len(boundaries.documents), boundaries.uniform_len))
    before = weight.shape[1] - 1
    slots, history = boundaries.history_slots(before)
    rows = x.new_zeros(len(x) + len(boundaries.documents) * before, x.shape[1])
    rows[slots] = x
    if initial is not None:
        rows[history] = initial[boundaries.document_rows].transpose(1, 2).to(x.dtype)
    return rows[None]


def _conv_tokens(rows: Tensor, x: Tensor, weight: Tensor, initial: Tensor | None, boundaries: Boundaries) -> Tensor:
    """`_conv_rows` undone: [t, c] in x.dtype."""
    if boundaries.uniform_len and initial is None:
        return rows.flatten(0, 1).to(x.dtype)
    return rows[0, boundaries.history_slots(weight.shape[1] - 1)[0]].to(x.dtype)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    boundaries: Boundaries,
    silu: bool = True,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution within each document: y_i = silu(bias + sum_j weight[:, j] x[i - k + 1 + j]).

    x: [t, c], weight: [c, k], bias: [c]; initial_state: [documents, c, k - 1], what came before each document (zeros
    where None). Returns y [t, c] and, on request, the final state [documents, c, k - 1]: the last k - 1 inputs.
    """
    boundaries.check(x=x)
    y = _CausalConv1d.apply(x, weight, bias, initial_state, boundaries, silu)
    return (y, _final_inputs(x, weight.shape[1] - 1, initial_state, boundaries)) if return_final_state else y


def _final_inputs(x: Tensor, before: int, initial: Tensor | None, boundaries: Boundaries) -> Tensor:
    """[documents, c, before]: the last inputs of each document, reaching back into what came before it."""
    finals = []
    for i, (start, end) in enumerate(pairwise(boundaries.offsets)):
        history = x.new_zeros(before, x.shape[1]) if initial is None else initial[i].t().to(x.dtype)
        finals.append(torch.cat([history, x[start:end]])[end - start :].t())
    return torch.stack(finals)


def conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, cache: ConvCache, slots: Tensor, silu: bool = True
) -> Tensor:
    """`causal_conv1d` of one token for each row: x [b, c] -> [b, c]; the rows' slots [b] int64 of the cache move on."""
    acc, by_tap = accumulate_dtype(x.dtype), weight.t().contiguous().to(accumulate_dtype(x.dtype))
    inputs = cache.state.transpose(1, 2)  # [slots, k - 1, c]
    window = torch.cat([inputs.index_select(0, slots), x[:, None].to(inputs.dtype)], 1)
    inputs.index_copy_(0, slots, window[:, 1:])
    y = x.to(acc) * by_tap[-1]
    for tap in range(len(by_tap) - 1):
        y.addcmul_(window[:, tap].to(acc), by_tap[tap])
    y = y if bias is None else y.add_(bias)
    return (F.silu(y, inplace=True) if silu else y).to(x.dtype)
