"""Bad steps: NaN, Inf and loss spikes are kept out of the weights, and stop the run when there are too many."""

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from prism_mcore.batch import PackedBatch
from prism_mcore.parallel import Groups
from prism_mcore.train.settings import GuardSettings

log = logging.getLogger(__name__)


class GuardStop(RuntimeError):
    """More bad steps than guards.skip_budget; the same on every rank. Exit code: exit_codes.STOPPED_BY_GUARD."""


class GuardedStats(Protocol):
    """What a guard looks at of a step's stats; the same on every rank but for row_losses."""

    @property
    def loss(self) -> float: ...

    @property
    def grad_norm(self) -> float: ...

    @property
    def tokens(self) -> int:
        """Labels that counted."""

    @property
    def row_losses(self) -> list[list[float]] | None:
        """Of this rank's rows, by micro-batch; None where no loss is computed."""


Suspects = Callable[[GuardedStats, Sequence[PackedBatch]], list[str]]


def worst_sequences(stats: GuardedStats, batches: Sequence[PackedBatch]) -> list[str]:
    """This rank's sequences that are to blame, the worst first: those whose loss is not finite, else the highest.

    Where no loss is computed (before the last stage) nobody knows.
    """
    if stats.row_losses is None:
        return []
    rows = [
        (loss, source, sample)
        for batch, losses in zip(batches, stats.row_losses, strict=True)
        for loss, source, sample, counts in zip(
            losses, batch.source_ids.tolist(), batch.sample_ids.tolist(), _counts(batch), strict=True
        )
        if counts
    ]
    broken = [row for row in rows if not math.isfinite(row[0])]
    worst = broken or sorted(rows)[-1:]
    return [f"sample {sample} of data.sources[{source}] (loss {loss:.4g})" for loss, source, sample in worst]


class Guard:
    """Decides after each step's gradients whether they may change the weights.

    run_dir: dumps go to <run_dir>/bad_steps/step_00000017/: per data-parallel rank the batch (rank_3.safetensors,
    tensors named <micro-batch>.<field>) and what was seen of it (rank_3.json). suspects: names what on this rank is to
    blame for a bad step.
    """

    def __init__(self, settings: GuardSettings, run_dir: Path, groups: Groups, suspects: Suspects = worst_sequences):
        self.settings, self.run_dir, self.groups, self.suspects = settings, run_dir, groups, suspects
        self._skipped = 0
        self._good_losses: deque[float] = deque(maxlen=settings.spike_window)

    def state(self) -> dict[str, Any]:
        """What a resumed run must know (JSON): skips spent so far, and the losses that spikes are measured by."""
        return {"skipped": self._skipped, "good_losses": list(self._good_losses)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._skipped = state["skipped"]
        self._good_losses.extend(state["good_losses"])

    def admits(self, step: int, stats: GuardedStats, batches: Sequence[PackedBatch]) -> bool:
        """May this step's gradients be applied? Every rank calls it with the same stats, so that all decide alike.

        A bad step is dumped, named in the log and answered with False, or GuardStop beyond the budget. One without a
        label that counts is not bad: there is nothing to apply.
        """
        if not stats.tokens:
            if self.groups.rank == 0:
                log.warning("step %d: no label counts, all are masked; the weights stay as they are", step)
            return False
        complaint = self._complaint(stats)
        if not complaint:
            self._good_losses.append(stats.loss)
            return True
        folder = self.run_dir / "bad_steps" / f"step_{step:08d}"
        suspects = self.suspects(stats, batches) if self.groups.tp_rank == 0 else []  # one rank speaks for all
        self._dump(folder, complaint, stats, batches, suspects)
        everyone: list[list[str]] = [[]] * self.groups.world_size
        dist.all_gather_object(everyone, [f"rank {self.groups.rank}: {suspect}" for suspect in suspects])
        self._skipped += 1
        message = f"step {step}: {complaint}. {_listed(everyone)}. Batches are in {folder}."
        if self._skipped > self.settings.skip_budget:
            raise GuardStop(
                f"{message} Bad steps so far: {self._skipped}, guards.skip_budget={self.settings.skip_budget}"
            )
        if self.groups.rank == 0:
            log.error("%s The step is skipped, %d of %d.", message, self._skipped, self.settings.skip_budget)
        return False

    def _complaint(self, stats: GuardedStats) -> str:
        if not math.isfinite(stats.loss):
            return f"the loss is {stats.loss}"
        if not math.isfinite(stats.grad_norm):
            return f"the gradient norm is {stats.grad_norm} (loss {stats.loss:.4f})"
        threshold, usual = self.settings.spike_threshold, self._usual_loss()
        if threshold and stats.loss > threshold * usual:
            return f"the loss {stats.loss:.4f} is above {threshold:g} times its median {usual:.4f}"
        return ""

    def _usual_loss(self) -> float:
        full = len(self._good_losses) == self.settings.spike_window
        return median(self._good_losses) if full else math.inf

    def _dump(
        self, folder: Path, complaint: str, stats: GuardedStats, batches: Sequence[PackedBatch], suspects: list[str]
    ) -> None:
        if self.groups.tp_rank > 0 or not (self.groups.is_first_stage or self.groups.is_last_stage):
            return
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{i}.{field.name}": value.cpu().contiguous()
            for i, batch in enumerate(batches)
            for field in fields(batch)
            if isinstance(value := getattr(batch, field.name), torch.Tensor)
        }
        name = f"rank_{self.groups.rank}"
        save_file(tensors, folder / f"{name}.safetensors")
        record = {
            "complaint": complaint,
            "loss": repr(stats.loss),
            "grad_norm": repr(stats.grad_norm),
            "suspects": suspects,
            "samples": [batch.sample_ids.tolist() for batch in batches],
        }
        (folder / f"{name}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def _counts(batch: PackedBatch) -> list[bool]:
    """Which sequences have a label that counts; the others have no loss."""
    assert batch.loss_mask is not None
    if batch.row_ids is None:
        return batch.loss_mask.any(-1).tolist()
    return [bool(batch.loss_mask[batch.row_ids == row].any()) for row in range(len(batch.source_ids))]


def _listed(of_ranks: list[list[str]]) -> str:
    suspects = [suspect for of_rank in of_ranks for suspect in of_rank]
    return "Suspects: " + "; ".join(suspects[:8]) + (f" and {len(suspects) - 8} more" if len(suspects) > 8 else "")
