"""Norms whose rows have the same bits in any batch. RMSNorm is the reference's: its sums are over a last dimension."""

import torch
import torch.distributed as dist
from torch import Tensor

from prism_kernels.activation.exact import silu
from prism_kernels.linear.exact import sum_over_ranks
from prism_kernels.norm import reference
from prism_kernels.norm.reference import rms_norm
from prism_kernels.precision import accumulate_dtype

__all__ = ["add_rms_norm", "add_scaled", "gated_rms_norm", "rms_norm"]


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
        grouped = silu(z.to(acc)).mul_(y.to(acc)).unflatten(-1, (num_groups, -1))
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
