"""Linear layers whose rows have the same bits in training and decoding: `kernels.linear=exact`."""

# t packed tokens (t / tp of them where activations are sequence-parallel), d hidden

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from prism_kernels.linear.exact import linear, sum_over_ranks


def column_parallel(x: Tensor, weight: Tensor, group: dist.ProcessGroup, sequence_parallel: bool) -> Tensor:
    """[t, 1, d] -> [t, 1, rows]; gathers sequence-parallel input."""
    if sequence_parallel:
        x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
    else:
        x = copy_to_tensor_model_parallel_region(x, group=group)
    return linear(x, weight)


class ExactColumnLinear(ColumnParallelLinear):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return column_parallel(x, self.weight, self.tp_group, self.sequence_parallel), None


class ExactRowLinear(RowParallelLinear):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(linear(x, self.weight), self.tp_group, self.sequence_parallel), None


class _SumOverRanks(torch.autograd.Function):
    """Each rank's part of [t, 1, d] -> their sum, or this rank's tokens of it where sequence-parallel."""

    @staticmethod
    def forward(ctx, x, group, sequence_parallel):
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        total = sum_over_ranks(x, group)
        if sequence_parallel:
            return total.chunk(dist.get_world_size(group))[dist.get_rank(group)].contiguous()
        return total

    @staticmethod
    def backward(ctx, grad):
        if not ctx.sequence_parallel:
            return grad, None, None
        whole = grad.new_empty(len(grad) * dist.get_world_size(ctx.group), *grad.shape[1:])
        dist.all_gather_into_tensor(whole, grad.contiguous(), group=ctx.group)
        return whole, None, None
