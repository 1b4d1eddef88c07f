"""Reference ops in plain torch: norms, activations, rotary embedding, convolution, attention; each exact and fast on a CPU.

The scan lives in `reference_scan`, the loss in `reference_loss`; every op can be imported from here. Activations are packed token-major ([t, ...]). Statistics
and sums are taken in fp32 for bf16 and fp16 inputs, in the input's own dtype for fp32 and fp64.
"""

# t packed tokens, h heads, p head_dim, c channels, k taps

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from prism_kernels.boundaries import Boundaries
from prism_kernels.precision import accumulate_dtype
from prism_kernels.reference_loss import linear_cross_entropy
from prism_kernels.reference_scan import ssd_recurrence, ssd_scan

__all__ = [
    "apply_rope",
    "attention",
    "causal_conv1d",
    "gated_rms_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rope_frequencies",
    "rope_table",
    "squared_relu",
    "ssd_recurrence",
    "ssd_scan",
    "swiglu",
]


# ---------------------------------------------------------------------------------------------------------------- norms


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        acc = accumulate_dtype(x.dtype)
        wide = x.to(acc)
        inv = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, inv)
        return (wide * inv).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, inv = ctx.saved_tensors
        normed = x.to(inv.dtype) * inv
        wide = grad.to(inv.dtype)
        grad_weight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad_normed = wide * weight
        mean = (grad_normed * normed).mean(-1, keepdim=True)
        grad_x = (grad_normed - normed * mean).mul_(inv)
        return grad_x.to(x.dtype), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; normalised in fp32, cast to x.dtype, then weighted (Llama's order).

    x: [..., d], weight: [d]; returns [..., d] in x.dtype (weight.dtype where that is wider).
    """
    return _RMSNorm.apply(x, weight, eps)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z, weight, eps, num_groups, group):
        acc = accumulate_dtype(y.dtype)
        gated = y.to(acc) * F.silu(z.to(acc))
        grouped = gated.unflatten(-1, (num_groups, -1))
        size = grouped.shape[-1] * (dist.get_world_size(group) if group is not None else 1)
        squares = grouped.square().sum(-1, keepdim=True)
        if group is not None:
            dist.all_reduce(squares, group=group)
        inv = (squares / size + eps).rsqrt()
        ctx.save_for_backward(y, z, weight, inv)
        ctx.size, ctx.group, ctx.num_groups = size, group, num_groups
        return ((grouped * inv).flatten(-2) * weight).to(y.dtype)

    @staticmethod
    def backward(ctx, grad):
        y, z, weight, inv = ctx.saved_tensors
        acc = inv.dtype
        wide_y, wide_z, grad = y.to(acc), z.to(acc), grad.to(acc)
        sigmoid = wide_z.sigmoid()
        silu = wide_z * sigmoid
        normed = ((wide_y * silu).unflatten(-1, (ctx.num_groups, -1)) * inv).flatten(-2)
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad_normed = (grad * weight).unflatten(-1, (ctx.num_groups, -1))
        dot = (grad_normed * normed.unflatten(-1, (ctx.num_groups, -1))).sum(-1, keepdim=True)
        if ctx.group is not None:
            dist.all_reduce(dot, group=ctx.group)
        normed = normed.unflatten(-1, (ctx.num_groups, -1))
        grad_gated = ((grad_normed - normed * (dot / ctx.size)) * inv).flatten(-2)
        grad_z = grad_gated * wide_y * sigmoid * (1 + wide_z * (1 - sigmoid))
        return (grad_gated * silu).to(y.dtype), grad_z.to(z.dtype), grad_weight, None, None, None


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
    if scaling is None or kind == "default":
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
    """cos and sin of every angle, each [t, head_dim/2] fp32, for position_ids of t elements in any shape."""
    inv_freq = rope_frequencies(head_dim, theta, scaling).to(position_ids.device)
    angles = position_ids.reshape(-1, 1).float() * inv_freq
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out[..., :half] = torch.addcmul(first * cos, second, sin, value=-sign)
    out[..., half:] = torch.addcmul(second * cos, first, sin, value=sign)
    return out


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
    """Rotate the halves of each head (non-interleaved, as Llama): q [t, h, p], k [t, hk, p], cos and sin [t, p/2]."""
    return _Rope.apply(q, k, cos[:, None], sin[:, None])


# ---------------------------------------------------------------------------------------------------------- convolution


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    boundaries: Boundaries,
    silu: bool = True,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution within each document, then silu: y_i = silu(bias + sum_j weight[:, j] x[i - k + 1 + j]).

    x: [t, c], weight: [c, k], bias: [c]; initial_state: [documents, c, k - 1], what came before each document (zeros
    where None). Returns y [t, c] and, on request, the final state [documents, c, k - 1]: the last k - 1 inputs.
    """
    boundaries.check(x=x)
    acc = accumulate_dtype(x.dtype)
    taps = weight.shape[1]
    outputs, finals = [], []
    wide_weight = weight.to(acc)
    for i in range(boundaries.num_documents):
        document = x[boundaries.offsets[i] : boundaries.offsets[i + 1]].to(acc)
        before = x.new_zeros(taps - 1, x.shape[1]) if initial_state is None else initial_state[i].t()
        padded = torch.cat([before.to(acc), document])
        length = document.shape[0]
        y = sum(padded[j : j + length] * wide_weight[:, j] for j in range(taps))
        y = y if bias is None else y + bias.to(acc)
        outputs.append((F.silu(y) if silu else y).to(x.dtype))
        finals.append(padded[length:].t().to(x.dtype))
    out = torch.cat(outputs)
    return (out, torch.stack(finals)) if return_final_state else out


# ------------------------------------------------------------------------------------------------------------ attention


def attention(
    q: Tensor, k: Tensor, v: Tensor, boundaries: Boundaries, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention within each document: q [t, h, p], k and v [t, hk, p] with h % hk == 0; returns [t, h, p].

    window w: query i sees keys j with i - w < j <= i, itself included (Mistral's convention).
    """
    boundaries.check(q=q, k=k, v=v)
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if boundaries.uniform_len:
        shape = (len(boundaries.documents), boundaries.uniform_len)
        out = _document_attention(*(x.unflatten(0, shape) for x in (q, k, v)), scale, window)
        return out.flatten(0, 1)
    parts = [
        _document_attention(*(x[None, start:end] for x in (q, k, v)), scale, window)[0]
        for _, start, end in boundaries.documents
    ]
    return torch.cat(parts) if parts else torch.empty_like(q)


def _document_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """[b, s, h, p] each; documents of equal length."""
    s = q.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    if window is None or window >= s:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    else:
        i = torch.arange(s, device=q.device)
        mask = (i[:, None] >= i) & (i[:, None] - i < window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2)
