"""Gradients of the whole model, gathered from any layout: `from gradients import whole_gradients, close`."""

import torch
import torch.distributed as dist

from prism_mcore.model.tensors import gather


def whole_gradients(chunks, wrapped, groups):
    """Gradients of the whole model on every rank: data-parallel shards, tensor-parallel slices, stages put together."""
    mine = {}
    for ddp, chunk in zip(wrapped, chunks, strict=True):
        for buffer in ddp.buffers:
            unshard(buffer, ddp)
        for name, tensor, parameter in chunk.table():
            shards = [torch.empty_like(tensor.main_grad) for _ in range(groups.tp_size)]
            dist.all_gather(shards, tensor.main_grad, group=groups.tp)
            mine[name] = gather(shards, parameter)
    stages = [None] * groups.pp_size
    dist.all_gather_object(stages, mine, group=groups.pp)
    return {name: gradient for stage in stages for name, gradient in stage.items()}


def unshard(buffer, ddp):
    """The distributed optimizer leaves each rank its own shard of the reduced gradients: gather all of them."""
    group = ddp.intra_dp_cp_group
    for bucket in buffer.buckets:
        size = bucket.grad_data.numel() // group.size()
        shard = bucket.grad_data[group.rank() * size : (group.rank() + 1) * size].clone()
        dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def close(got, want, tolerance=1e-5):
    """Relative to the largest element of each tensor."""
    return (got - want).abs().max() <= tolerance * want.abs().max() + 1e-12
