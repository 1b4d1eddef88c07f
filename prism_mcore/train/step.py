"""One step: forward and backward over the micro-batches through megatron-core's schedules, ready for the update."""

# t packed tokens of a micro-batch: its b sequences of s tokens, one after another

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from prism_mcore.agree import summed
from prism_mcore.batch import PackedBatch
from prism_mcore.parallel import Groups
from prism_mcore.train.optimizer import norm_of, squared_gradient_norm
from prism_mcore.train.pipeline import run_pipeline

Batch = TypeVar("Batch", bound=PackedBatch)


@dataclass(frozen=True)
class StepStats:
    """What a step saw, the same on every rank but for `rows`.

    loss 2.31, grad_norm 0.8, source_loss (2.1, nan), source_tokens (4096, 0)   # the second source had no sample
    """

    loss: float  # nats per token that counts; nan where none does
    grad_norm: float  # nan where there are no gradients
    source_loss: tuple[float, ...]  # nats per token of each of data.sources
    source_tokens: tuple[int, ...]  # tokens that counted
    rows: list[
        Tensor
    ]  # (nats, tokens) [b, 2] of this rank's rows, by micro-batch, on the device; no rows before the last stage
    stop: bool = False  # has a rank been asked to end the run?

    @property
    def tokens(self) -> int:
        """Labels that counted."""
        return sum(self.source_tokens)

    @property
    def row_losses(self) -> list[list[float]] | None:
        """Of this rank's rows, by micro-batch; None before the last stage. Waits for the device."""
        return [(r[:, 0] / r[:, 1]).tolist() for r in torch.stack(self.rows).cpu()] if self.rows else None

    @staticmethod
    def of(sums: Mapping[str, Tensor], rows: list[Tensor]) -> "StepStats":
        """From what `agree.summed` made of nats and tokens [sources] and, in training, of squared_norm and stop."""
        nats, tokens = sums["nats"], sums["tokens"]
        return StepStats(
            loss=float(nats.sum() / tokens.sum()),
            grad_norm=norm_of(sums["squared_norm"]) if "squared_norm" in sums and tokens.any() else float("nan"),
            source_loss=tuple((nats / tokens).tolist()),
            source_tokens=tuple(int(n) for n in tokens),
            rows=rows,
            stop="stop" in sums and bool(sums["stop"]),
        )


def backward(
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: list[PackedBatch],
    groups: Groups,
    num_sources: int,
    stop: Callable[[], bool] = lambda: False,
) -> StepStats:
    """Gradients of the mean loss over the global batch, ready in `optimizer` for `update`; no weight changes yet.

    stop: has this rank been asked to end the run? Asked once the gradients are there, and told to all with the rest.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    sums, rows = forward_backward(chunks, batches, groups, num_sources)
    sums["squared_norm"] = squared_gradient_norm(optimizer, groups, sums["nats"].device)
    sums["stop"] = torch.full_like(sums["squared_norm"], stop())
    return StepStats.of(summed(sums), rows)


def forward_backward(
    chunks: list[DistributedDataParallel],
    batches: list[PackedBatch],
    groups: Groups,
    num_sources: int,
    forward_only: bool = False,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Run this rank's micro-batches through the pipeline.

    Returns what this rank adds to the sums over all ranks, nats and tokens [num_sources] fp64 on the device, and
    (nats, tokens) [b, 2] of each micro-batch's rows.
    """
    rows = run_pipeline(
        _forward_step,
        chunks,
        lambda: iter(batches),
        num_micro_batches=len(batches),
        num_tokens=batches[0].position_ids.numel() * groups.cp_size,
        forward_only=forward_only,
    )
    # By source (nats, tokens); float64 holds any token count exactly. Tensor-parallel ranks all have the same.
    total = torch.zeros(num_sources, 2, dtype=torch.float64, device=next(chunks[0].parameters()).device)
    if groups.tp_rank == 0:
        for batch, row_sums in zip(batches, rows, strict=False):  # no rows before the last stage
            sources = batch.source_ids.to(total.device, torch.int64, non_blocking=True)
            total.index_add_(0, sources, row_sums)
    return {"nats": total[:, 0], "tokens": total[:, 1]}, rows


def _forward_step(batches: Iterator[PackedBatch], chunk: DistributedDataParallel):
    batch = to_device(next(batches), next(chunk.parameters()).device)
    return chunk(batch), partial(_loss, batch=batch)


def _loss(output: tuple[Tensor, Tensor], batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """megatron-core's triple: loss summed over tokens, how many tokens, and (nats, tokens) of each row for the log."""
    loss_sum, logprobs = output
    assert batch.loss_mask is not None
    counted = torch.stack([-logprobs * batch.loss_mask.flatten(), batch.loss_mask.flatten()], dim=-1)
    if batch.row_ids is None:
        rows = counted.unflatten(0, batch.loss_mask.shape).sum(1, dtype=torch.float64)
    else:
        rows = counted.new_zeros(len(batch.source_ids), 2, dtype=torch.float64)
        rows.index_add_(0, batch.row_ids.flatten(), counted.double())
    # Filled on the device: copying a number there would wait for all that was started before it.
    return loss_sum, torch.full((), batch.num_tokens, dtype=torch.int, device=rows.device), rows


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`, copied without waiting where the loader pinned them.

    cu_seqlens and parents stay where they are: the model reads them on the CPU, and copies what its ops need of them.
    """
    stay = ("cu_seqlens", "parents")
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name not in stay}
    moved = {n: t.to(device, non_blocking=True) for n, t in tensors.items() if isinstance(t, Tensor)}
    return replace(batch, **moved)
