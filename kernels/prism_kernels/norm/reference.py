"""Norms in plain torch; statistics in fp32 for bf16 and fp16 inputs, in the input's own dtype for fp32 and fp64."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from prism_kernels.precision import accumulate_dtype


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
