"""Ops whose result for a token has the same bits in training and in decoding, in any batch: `rl.parity=exact`.

A token's log-probability is then one number, whichever path computes it. What an op here may use on a CPU:
- arithmetic that IEEE rounds once (+, -, *, /, sqrt), each as an operation of its own: whether a fused multiply-add is
  one rounding or two depends on whether an element falls into a vector or into the rest after the last one;
- torch.exp, log, log1p, cos and sin, which compute the rest as a vector, too. exp2, silu, sigmoid and softplus do not;
- sums over a whole last dimension, and over blocks of a fixed size that are added in order;
- products of `exact_linear.mm`, and batched ones of at least eight rows, over sums of a fixed length.
Sums start anew at each document. Gradients are the reference's: nothing compares them with decoding.
Attention, the scan, the loss and products have their own files; every op can be imported from here.
"""

# t packed tokens, b rows of a decode step, h heads, p head_dim, c channels, k taps

import torch
import torch.distributed as dist
from torch import Tensor

from prism_kernels import reference
from prism_kernels.boundaries import Boundaries
from prism_kernels.caches import ConvCache
from prism_kernels.exact_attention import attention, attention_decode
from prism_kernels.exact_linear import sum_over_ranks
from prism_kernels.exact_loss import linear_cross_entropy, logits
from prism_kernels.exact_scan import ssd_cache, ssd_prefill, ssd_scan, ssd_step
from prism_kernels.precision import accumulate_dtype
from prism_kernels.reference import rms_norm, squared_relu

__all__ = [
    "add_rms_norm",
    "add_scaled",
    "apply_rope",
    "attention",
    "attention_decode",
    "causal_conv1d",
    "conv_step",
    "gated_rms_norm",
    "linear_cross_entropy",
    "logits",
    "rms_norm",
    "squared_relu",
    "ssd_cache",
    "ssd_prefill",
    "ssd_scan",
    "ssd_step",
    "swiglu",
]


def _silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)); no autograd."""
    return x / x.neg().exp_().add_(1)


# ---------------------------------------------------------------------------------------------------------------- norms


def add_rms_norm(x: Tensor, branch: Tensor, alpha: float, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(h), h) of h = x + alpha * branch, all [..., d]: the end of one sub-layer and the norm of the next."""
    h = add_scaled(x, branch, alpha)
    return rms_norm(h, weight, eps), h


class _AddScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, alpha):
        ctx.alpha = alpha
        acc = accumulate_dtype(x.dtype)
        return x.to(acc).add(branch.to(acc) * alpha).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad * ctx.alpha, None


def add_scaled(x: Tensor, branch: Tensor, alpha: float) -> Tensor:
    """x + alpha * branch, rounded once more than a fused one, but always the same way."""
    return x + branch if alpha == 1 else _AddScaled.apply(x, branch, alpha)


class _GatedRMSNorm(reference._GatedRMSNorm):
    @staticmethod
    def forward(ctx, y, z, weight, eps, num_groups, group):
        acc = accumulate_dtype(y.dtype)
        grouped = _silu(z.to(acc)).mul_(y.to(acc)).unflatten(-1, (num_groups, -1))
        ctx.size = grouped.shape[-1] * (dist.get_world_size(group) if group is not None else 1)
        squares = torch.linalg.vector_norm(grouped, dim=-1, keepdim=True).square_()
        inverse = sum_over_ranks(squares, group).div_(ctx.size).add_(eps).rsqrt_()
        ctx.save_for_backward(y, z, weight, inverse)
        ctx.group = group
        return grouped.mul_(inverse).flatten(-2).mul_(weight).to(y.dtype)


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """`reference.gated_rms_norm`; the sum of squares over ranks is added in rank order."""
    spans = group is not None and dist.get_world_size(group) > 1
    return _GatedRMSNorm.apply(y, z, weight, eps, num_groups, group if spans else None)


# ---------------------------------------------------------------------------------------------------------- activations


class _SwiGLU(reference._SwiGLU):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return _silu(gate.to(accumulate_dtype(gate.dtype))).mul_(up).to(gate.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a [..., 2 f] tensor that holds gate in its first half, rounded once."""
    return _SwiGLU.apply(gate_up)


# --------------------------------------------------------------------------------------------------------------- rotary


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    wide = x.to(cos.dtype) if x.dtype != torch.float64 else x
    swapped = torch.cat((wide[..., half:], wide[..., :half]), -1)
    return (wide * cos).add_(swapped.mul_(sin)).to(x.dtype)


class _Rope(reference._Rope):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the halves of each head (non-interleaved, as Llama): q [t, h, p], k [t, hk, p], tables of `rope_table`."""
    return _Rope.apply(q, k, cos[:, None], sin[:, None])


# ---------------------------------------------------------------------------------------------------------- convolution


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
        return reference._conv_tokens(_silu(y) if silu else y, x, weight, initial, boundaries)


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
    return (_silu(y) if silu else y).to(x.dtype)
