"""The convolution as shifted products, whose elements have the same bits in training and decoding."""

# t packed tokens, b rows of a decode step, c channels, k taps

import torch
from torch import Tensor

from prism_kernels.activation.exact import silu as exact_silu
from prism_kernels.boundaries import Boundaries
from prism_kernels.caches import ConvCache
from prism_kernels.conv import reference
from prism_kernels.precision import accumulate_dtype


class _CausalConv1d(reference._CausalConv1d):
    @staticmethod
    def forward(ctx, x, weight, bias, initial, boundaries, silu):
        ctx.save_for_backward(x, weight, bias, initial)
        ctx.boundaries, ctx.silu = boundaries, silu
        rows = reference._conv_rows(x, weight, initial, boundaries)
        taps, by_tap = weight.shape[1], weight.t().contiguous().to(rows.dtype)
        y = rows * by_tap[-1]
        if bias is not None:
            y += bias
        product = torch.empty_like(y)
        for shift in range(1, min(taps, rows.shape[1])):
            early = torch.mul(rows[:, :-shift], by_tap[-1 - shift], out=product[:, shift:])
            y[:, shift:] += early
        return reference._conv_tokens(exact_silu(y) if silu else y, x, weight, initial, boundaries)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    boundaries: Boundaries,
    silu: bool = True,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.causal_conv1d` as shifted products: x [t, c], weight [c, k], bias [c]."""
    boundaries.check(x=x)
    y = _CausalConv1d.apply(x, weight, bias, initial_state, boundaries, silu)
    if not return_final_state:
        return y
    return y, reference._final_inputs(x, weight.shape[1] - 1, initial_state, boundaries)


def conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, cache: ConvCache, slots: Tensor, silu: bool = True
) -> Tensor:
    """`causal_conv1d` of one token for each row: x [b, c] -> [b, c]; the rows' slots [b] int64 of the cache move on."""
    acc, by_tap = accumulate_dtype(x.dtype), weight.t().contiguous()
    inputs = cache.state.transpose(1, 2)  # [slots, k - 1, c]
    window = torch.cat([inputs[slots], x[:, None].to(inputs.dtype)], 1)
    inputs[slots] = window[:, 1:]
    y = x.to(acc) * by_tap[-1]
    if bias is not None:
        y += bias
    for shift in range(1, len(by_tap)):
        y += window[:, -1 - shift].to(acc) * by_tap[-1 - shift]
    return (exact_silu(y) if silu else y).to(x.dtype)
