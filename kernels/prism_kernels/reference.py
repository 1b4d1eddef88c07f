"""Reference ops in plain torch, exact and fast on a CPU: norms, activations, rotary embedding, convolution.

Attention, the scan and the loss have their own files; every op can be imported from here. Activations are packed
token-major ([t, ...]). Statistics and sums are taken in fp32 for bf16 and fp16 inputs, in the input's own dtype for
fp32 and fp64.
"""

# t packed tokens, h heads, p head_dim, c channels, k taps

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from prism_kernels.boundaries import Boundaries
from prism_kernels.precision import accumulate_dtype
from prism_kernels.reference_attention import attention
from prism_kernels.reference_decode import attention_decode, conv_step, lm_logits, ssd_cache, ssd_prefill, ssd_step
from prism_kernels.reference_loss import linear_cross_entropy
from prism_kernels.reference_scan import ssd_recurrence, ssd_scan

__all__ = [
    "adamw",
    "add_rms_norm",
    "apply_rope",
    "attention",
    "attention_decode",
    "causal_conv1d",
    "conv_step",
    "gated_rms_norm",
    "linear_cross_entropy",
    "lm_logits",
    "rms_norm",
    "rope_frequencies",
    "rope_table",
    "squared_relu",
    "ssd_cache",
    "ssd_prefill",
    "ssd_recurrence",
    "ssd_scan",
    "ssd_step",
    "swiglu",
]


# ---------------------------------------------------------------------------------------------------------------- norms


def _inverse_rms(x: Tensor, size: int, eps: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """1 / sqrt(mean of squares + eps) over the last dimension, kept; over `size` elements in all, across the group."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    if group is not None:
        dist.all_reduce(squares, group=group)
    return squares.div_(size).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(accumulate_dtype(x.dtype))
        inverse = _inverse_rms(wide, x.shape[-1], eps)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        normed, grad = x.to(inverse.dtype) * inverse, grad.to(inverse.dtype)
        weighted = grad * normed
        grad_weight = weighted.flatten(0, -2).sum(0).to(weight.dtype)
        mean = weighted.mul_(weight).mean(-1, keepdim=True)
        grad_x = torch.mul(grad, weight, out=weighted).addcmul_(normed, mean, value=-1).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; normalised in fp32, cast to x.dtype, then weighted (Llama's order).

    x: [..., d], weight: [d]; returns [..., d] in x.dtype (weight.dtype where that is wider).
    """
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, branch: Tensor, alpha: float, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(h), h) for h = x + alpha * branch: a residual sum and the next sub-layer's norm.

    x, branch: [..., d], weight: [d]; h is rounded to x.dtype before it is normalised.
    """
    h = torch.add(x, branch, alpha=alpha)
    return rms_norm(h, weight, eps), h


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z, weight, eps, num_groups, group):
        acc = accumulate_dtype(y.dtype)
        grouped = F.silu(z.to(acc)).mul_(y.to(acc)).unflatten(-1, (num_groups, -1))
        ctx.size = grouped.shape[-1] * (dist.get_world_size(group) if group is not None else 1)
        inverse = _inverse_rms(grouped, ctx.size, eps, group)
        ctx.save_for_backward(y, z, weight, inverse)
        ctx.group = group
        return grouped.mul_(inverse).flatten(-2).mul_(weight).to(y.dtype)

    @staticmethod
    def backward(ctx, grad):
        y, z, weight, inverse = ctx.saved_tensors
        acc, shape = inverse.dtype, (inverse.shape[-2], -1)  # [num_groups, channels of a group]
        wide_y, wide_z, grad = y.to(acc), z.to(acc), grad.to(acc).unflatten(-1, shape)
        silu = F.silu(wide_z)
        normed = (silu * wide_y).unflatten(-1, shape).mul_(inverse)
        weighted = grad * normed
        grad_weight = weighted.flatten(0, -3).sum(0).flatten().to(weight.dtype)
        by_group = weight.to(acc).unflatten(-1, shape)
        dot = weighted.mul_(by_group).sum(-1, keepdim=True)
        if ctx.group is not None:
            dist.all_reduce(dot, group=ctx.group)
        grad_gated = torch.mul(grad, by_group, out=weighted).addcmul_(normed, dot.div_(-ctx.size)).mul_(inverse)
        grad_gated = grad_gated.flatten(-2)
        grad_y = silu.mul_(grad_gated).to(y.dtype)
        grad_z = torch.ops.aten.silu_backward(grad_gated.mul_(wide_y), wide_z).to(z.dtype)
        return grad_y, grad_z, grad_weight, None, None, None


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """RMSNorm of y * silu(z) over each of num_groups equal parts of the last dimension; Mamba-2's output norm.

    y, z: [..., d], weight: [d]; returns [..., d] in y.dtype. num_groups counts the groups on this rank; with one and a
    process `group`, the norm's group is spread over its ranks and the sum of squares is all-reduced in both directions.
    """
    if y.shape[-1] % num_groups:
        raise ValueError(
            f"gated_rms_norm: {y.shape[-1]} channels do not split into num_groups={num_groups} equal groups"
        )
    spans = group is not None and dist.get_world_size(group) > 1
    if spans and num_groups != 1:
        raise ValueError(f"gated_rms_norm: a group that spans ranks needs num_groups=1 on each, got {num_groups}")
    return _GatedRMSNorm.apply(y, z, weight, eps, num_groups, group if spans else None)


# ---------------------------------------------------------------------------------------------------------- activations


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, -1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return out


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a [..., 2 f] tensor that holds gate in its first half; saves its input only."""
    return _SwiGLU.apply(gate_up)


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu().square_()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return x.relu().mul_(grad).mul_(2)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)**2; saves its input only."""
    return _SquaredReLU.apply(x)


# --------------------------------------------------------------------------------------------------------------- rotary


def rope_frequencies(head_dim: int, theta: float, scaling: dict | None = None) -> Tensor:
    """Radians per position of each of head_dim/2 pairs, fp32, as transformers computes them.

    scaling: None or Llama-3's dict with `rope_type` "llama3", `factor`, `low_freq_factor`, `high_freq_factor` and
    `original_max_position_embeddings`.
    """
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    kind = (scaling or {}).get("rope_type", "default")
    if not scaling or kind == "default":
        return inv_freq
    if kind != "llama3":
        raise ValueError(f"rope scaling {kind!r} is not supported; supported are default and llama3")
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * torch.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    medium = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(medium, blended, scaled)


def rope_table(position_ids: Tensor, head_dim: int, theta: float, scaling: dict | None = None) -> tuple[Tensor, Tensor]:
    """What `apply_rope` takes, each [t, head_dim] fp32, for position_ids of t elements in any shape: once per batch.

    cos of each angle, twice; sin of each angle, first negated (for the half that is subtracted), then plain.
    """
    inv_freq = _frequencies_on(position_ids.device, head_dim, theta, tuple((scaling or {}).items()))
    angles = position_ids.reshape(-1, 1).float() * inv_freq
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


@lru_cache(maxsize=16)
def _frequencies_on(device: torch.device, head_dim: int, theta: float, scaling: tuple[tuple[str, Any], ...]) -> Tensor:
    """Copied to a device once: a copy waits for a GPU, and is refused while a CUDA graph is captured."""
    with torch.inference_mode(False):  # the first to ask may be generation, the next training
        return rope_frequencies(head_dim, theta, dict(scaling)).to(device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    wide = x.to(cos.dtype) if x.dtype != torch.float64 else x
    swapped = torch.cat((wide[..., half:], wide[..., :half]), -1)
    return (wide * cos).addcmul_(swapped, sin, value=sign).to(x.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(q, cos, sin, 1), _rotate(k, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad_q, grad_k):
        cos, sin = ctx.saved_tensors
        return _rotate(grad_q, cos, sin, -1), _rotate(grad_k, cos, sin, -1), None, None


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the halves of each head (non-interleaved, as Llama): q [t, h, p], k [t, hk, p], tables of `rope_table`."""
    return _Rope.apply(q, k, cos[:, None], sin[:, None])


# ---------------------------------------------------------------------------------------------------------- convolution


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


# ------------------------------------------------------------------------------------------------------------ optimizer


@torch.no_grad()
def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor | None],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
) -> None:
    """One step of AdamW (arXiv 1711.05101, as torch.optim.AdamW), in place; copies receive the new parameters rounded.

    params, exp_avgs, exp_avg_sqs: n fp32 tensors; grads: n of fp32, bf16 or fp16, multiplied by grad_scale (clipping);
    copies: n tensors of the model's dtype or Nones. step counts from 1.
    """
    corrections = [1 - beta**step for beta in betas]
    for param, grad, exp_avg, exp_avg_sq, copy in zip(params, grads, exp_avgs, exp_avg_sqs, copies, strict=True):
        grad = grad.to(param.dtype) * grad_scale
        exp_avg.lerp_(grad, 1 - betas[0])
        exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
        root = exp_avg_sq.sqrt().div_(corrections[1] ** 0.5).add_(eps)
        param.mul_(1 - lr * weight_decay).addcdiv_(exp_avg, root, value=-lr / corrections[0])
        if copy is not None:
            copy.copy_(param)
