"""One step: forward and backward over the micro-batches through megatron-core's schedules, ready for the update."""

# t packed tokens of a micro-batch: its b sequences of s tokens, one after another

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from prism_mcore.batch import PackedBatch
from prism_mcore.parallel import Groups
from prism_mcore.train.optimizer import gradient_norm

Batch = TypeVar("Batch", bound=PackedBatch)


@dataclass(frozen=True)
class StepStats:
    """What a step saw, the same on every rank.

    loss 2.31, grad_norm 0.8, source_loss (2.1, nan), source_tokens (4096, 0)   # the second source had no sample
    """

    loss: float  # nats per token that counts
    grad_norm: float  # nan where gradients were not computed
    source_loss: tuple[float, ...]  # nats per token of each of data.sources
    source_tokens: tuple[int, ...]  # tokens that counted
    row_losses: list[list[float]] | None  # of this rank's rows, by micro-batch; None before the last stage


def backward(
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: list[PackedBatch],
    groups: Groups,
    num_sources: int,
) -> StepStats:
    """Gradients of the mean loss over the global batch, ready in `optimizer` for `update`; no weight changes yet."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    loss = forward_backward(chunks, batches, groups, num_sources)
    return replace(loss, grad_norm=gradient_norm(optimizer))


def forward_backward(
    chunks: list[DistributedDataParallel],
    batches: list[PackedBatch],
    groups: Groups,
    num_sources: int,
    forward_only: bool = False,
) -> StepStats:
    """Run this rank's micro-batches through the pipeline; the loss of the global batch on every rank."""
    seq_tokens = batches[0].position_ids.numel()
    rows = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=seq_tokens,  # a micro-batch is one packed sequence of t tokens
        micro_batch_size=1,
        forward_only=forward_only,
    )
    # By source (nats, tokens); float64 holds any token count exactly.
    total = torch.zeros(num_sources, 2, dtype=torch.float64, device=next(chunks[0].parameters()).device)
    for batch, row_sums in zip(batches, rows, strict=False):  # no rows before the last stage
        total.index_add_(0, batch.source_ids.to(total.device, torch.int64), row_sums)
    dist.all_reduce(total, group=groups.dp_cp)
    dist.all_reduce(total, group=groups.pp)  # the other stages add zeros
    nats, tokens = total.cpu().unbind(-1)
    return StepStats(
        loss=float(nats.sum() / tokens.sum()),
        grad_norm=float("nan"),
        source_loss=tuple((nats / tokens).tolist()),
        source_tokens=tuple(int(n) for n in tokens),
        row_losses=[(r[:, 0] / r[:, 1]).tolist() for r in torch.stack(rows).cpu()] if rows else None,
    )


def _forward_step(batches: Iterator[PackedBatch], chunk: DistributedDataParallel):
    batch = to_device(next(batches), next(chunk.parameters()).device)
    return chunk(batch), partial(_loss, batch=batch)


def _loss(output: tuple[Tensor, Tensor], batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """megatron-core's triple: loss summed over tokens, how many tokens, and (nats, tokens) of each row for the log."""
    loss_sum, logprobs = output
    assert batch.loss_mask is not None
    nats = -(logprobs.view_as(batch.loss_mask) * batch.loss_mask).sum(-1, dtype=torch.float64)
    rows = torch.stack([nats, batch.loss_mask.sum(-1, dtype=torch.float64)], dim=-1)
    # Filled on the device: copying a number there would wait for all that was started before it.
    return loss_sum, torch.full((), batch.num_tokens, dtype=torch.int, device=nats.device), rows


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`, copied without waiting where the loader pinned them.

    cu_seqlens stays where it is: the model reads lengths on the CPU, and copies what its ops need of them.
    """
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "cu_seqlens"}
    moved = {n: t.to(device, non_blocking=True) for n, t in tensors.items() if isinstance(t, Tensor)}
    return replace(batch, **moved)
