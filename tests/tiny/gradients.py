"""Losses and gradients of the whole model from any layout: `from tiny.gradients import losses_and_gradients, close`."""

import torch
import torch.distributed as dist
from tiny.models import SPECS, packed_batches

from prism_mcore.agree import summed
from prism_mcore.model.build import build_chunks
from prism_mcore.model.fp8 import Fp8
from prism_mcore.model.ops import Ops
from prism_mcore.model.split import split_layers
from prism_mcore.model.tensors import gather
from prism_mcore.train.optimizer import wrap
from prism_mcore.train.step import StepStats, forward_backward

SEED = 7


def losses_and_gradients(
    groups,
    spec_name,
    sequence_parallel=False,
    recompute="",
    micro_batches=4,
    overlap=False,
    fp8="off",
    kernels=None,
    seed=0,
    batches=None,
    **reduction,
):
    """Loss and whole gradients by global name, from micro-batches of eight rows, dealt to data-parallel ranks.

    spec_name: of SPECS, or a spec. batches: other micro-batches.
    """
    spec = SPECS[spec_name] if isinstance(spec_name, str) else spec_name
    split = split_layers(spec, groups.pp_size, groups.vpp, seq_len=16)
    ops = Ops(kernels or {}, torch.device("cpu"))
    chunks = build_chunks(
        spec,
        split,
        groups,
        ops,
        dtype=torch.float32,
        device=torch.device("cpu"),
        sequence_parallel=sequence_parallel,
        recompute=frozenset(recompute),
        fp8=None if fp8 == "off" else Fp8(fp8, ops, groups.tp),
    )
    for chunk in chunks:
        chunk.initialise(SEED)
    instances = dist.get_world_size() // 2 if groups.dp_size == 4 else 1
    wrapped = wrap(chunks, groups, optimizer_instances=instances, overlap=overlap, **reduction)
    batches = batches or packed_batches(spec, micro_batches, b=8 // micro_batches, seed=seed)
    batches = batches[groups.dp_rank :: groups.dp_size]
    if groups.cp_size > 1:
        batches = [batch.shard(groups.cp_size, groups.cp_rank) for batch in batches]
    for ddp in wrapped:
        ddp.zero_grad_buffer()
    stats = StepStats.of(summed(forward_backward(wrapped, batches, groups, num_sources=2)[0]), [])
    return stats, whole_gradients(chunks, wrapped, groups)


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
