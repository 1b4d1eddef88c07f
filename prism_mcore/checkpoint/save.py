"""Saving a checkpoint: every rank writes its own ranges as they lie, rank 0 the rest; what is not whole gets no name.

Nothing is gathered, and replicas write nothing: a save takes some blocks of memory or, where training goes on
meanwhile, a copy of what this rank writes, which a thread of its own process writes.
"""

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from prism_mcore.agree import all_ranks, deadline, end_process, gather_failures
from prism_mcore.checkpoint.durable import FileRecord, sync_folder, write_atomically
from prism_mcore.checkpoint.files import Workers
from prism_mcore.checkpoint.folder import (
    BEST,
    LATEST,
    VALIDATION_FILE,
    CheckpointError,
    best_of,
    complete,
    complete_steps,
    state_text,
    step_name,
)
from prism_mcore.checkpoint.index import INDEX, index_of, index_text
from prism_mcore.checkpoint.optimizer_state import optimizer_step
from prism_mcore.checkpoint.places import Piece
from prism_mcore.checkpoint.settings import CheckpointSettings
from prism_mcore.checkpoint.sharded import Owned, describe_model, layout, own_tensors
from prism_mcore.checkpoint.stored import write_pieces
from prism_mcore.meeting import Meeting
from prism_mcore.parallel import Groups

DEADLINE = "checkpoint.save_deadline_s"

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run; every rank holds one and calls its methods at the same steps.

    folder: <run>/checkpoints, on a file system that all ranks see.
    """

    def __init__(self, folder: Path, settings: CheckpointSettings, groups: Groups):
        self.folder, self.settings, self.groups = folder, settings, groups
        self._pending: _Save | None = None
        self._meeting = Meeting.of_all_ranks(timedelta(seconds=settings.save_deadline_s))

    def save(
        self,
        step: int,
        chunks: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        state: dict[str, Any],
        more: dict[str, Iterable[Owned]] | None = None,
    ) -> None:
        """Write weights, optimizer, random numbers and `state` (JSON) as the checkpoint after `step` steps.

        more: other tensors over parameters, such as those of RL's reference policy, by what is before their keys.
        With checkpoint.async_save it returns once everything is copied, and `poll` completes it.
        Raises CheckpointError on all ranks where one cannot write; older checkpoints are untouched. A save that is not
        done after checkpoint.save_deadline_s ends the process.
        """
        self.wait()
        with deadline(self.settings.save_deadline_s, f"saving {self.folder / step_name(step)}", DEADLINE):
            save = _Save(self.folder, step, self.groups, self.settings, self._meeting)
            save.plan(chunks, optimizer, state, more or {}, copy=self.settings.async_save)
            if self.settings.async_save:
                save.start()
                self._pending = save
            else:
                save.write()
                save.finish()

    def poll(self) -> None:
        """Complete an asynchronous save once every rank has written its part; call it after every step."""
        if self._pending is not None and all_ranks(not self._pending.writing):
            self.wait()
        elif self._pending is not None and self._pending.age_s > self.settings.save_deadline_s:
            end_process(f"saving {self._pending.path}", self.settings.save_deadline_s, DEADLINE)

    def wait(self) -> None:
        """Complete an asynchronous save, if there is one; call it before the run ends."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            with deadline(self.settings.save_deadline_s - pending.age_s, f"saving {pending.path}", DEADLINE):
                pending.finish()


class _Save:
    """One save, in three parts: `plan` (all ranks together), `write` (each alone), `finish` (all ranks together)."""

    def __init__(self, folder: Path, step: int, groups: Groups, settings: CheckpointSettings, meeting: Meeting):
        self.folder, self.step, self.groups, self.settings, self.meeting = folder, step, groups, settings, meeting
        self.path = folder / step_name(step)
        self.temporary = folder / f".tmp_{step_name(step)}"
        self.begun = time.monotonic()
        self.error: Exception | None = None
        self.thread: threading.Thread | None = None

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.begun

    @property
    def writing(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def plan(
        self,
        chunks: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        state: dict[str, Any],
        more: dict[str, Iterable[Owned]],
        copy: bool,
    ) -> None:
        with self._agreed():
            if self.groups.rank == 0:
                self.text = state_text(self.step, layout(self.groups), optimizer_step(optimizer), state)
                self._prepare_folder()
        with self._agreed():
            self.writer = _Writer(self.temporary / f"__{self.groups.rank}_0.safetensors")
            own = own_tensors(describe_model(chunks, self.groups), optimizer, self.groups, more)
            self.writer.take(own, copy)

    def start(self) -> None:
        self.thread = threading.Thread(target=self.write, name=f"save {self.path.name}", daemon=True)
        self.thread.start()

    def write(self) -> None:
        try:
            self.writer.write()
        except Exception as error:  # reported to every rank by `finish`
            self.error = error

    def finish(self) -> None:
        if self.thread is not None:
            self.thread.join()
        with self._agreed():
            if self.error is not None:
                raise self.error
        written: list[Any] = [None] * self.groups.world_size
        dist.all_gather_object(written, (self.writer.path.name, self.writer.pieces, self.writer.record))
        with self._agreed():
            if self.groups.rank == 0:
                self._complete(written)
        if self.groups.rank == 0:
            log.info("saved %s in %.1f s", self.path, self.age_s)

    def _prepare_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(".tmp_*"):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        self.temporary.mkdir()

    def _complete(self, written: list[tuple[str, list[tuple[Piece, torch.dtype]], FileRecord]]) -> None:
        """On rank 0, when every rank's tensors are on the disk: the index, the manifest, the rename."""
        index = index_of((piece, dtype, file) for file, pieces, _ in written for piece, dtype in pieces)
        (self.temporary / INDEX).write_text(index_text(index), encoding="utf-8")
        complete(self.temporary, self.text, {file: record for file, _, record in written})
        if self.path.exists():  # the run went back to an earlier step, and has come here again
            _discard(self.path)
        os.replace(self.temporary, self.path)
        sync_folder(self.folder)
        write_atomically(self.folder / LATEST, self.path.name)
        self._remove_old()

    def _remove_old(self) -> None:
        keep, steps = self.settings.keep, complete_steps(self.folder)
        best = best_of(steps, self.folder.parent / VALIDATION_FILE, self.settings.keep_best)
        if best is not None:
            write_atomically(self.folder / BEST, best.name)
        older = [path for path in steps if path < self.path]
        for path in older[: max(0, len(older) + 1 - keep)] if keep else []:
            if path != best:
                _discard(path)

    @contextlib.contextmanager
    def _agreed(self) -> Iterator[None]:
        """Every rank learns of an error on one rank, and raises; the half-written folder goes."""
        failure = ""
        try:
            yield
        except Exception as error:
            failure = f"rank {self.groups.rank}: {type(error).__name__}: {error}"
        self.meeting.join()  # ranks write unequally long
        failures = gather_failures(failure)
        if failures:
            if self.groups.rank == 0:
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise CheckpointError(
                f"cannot write {self.path} ({'; '.join(failures)}). {_free_space(self.folder)}"
                " The unfinished checkpoint was removed, older ones are untouched."
            )


def _discard(path: Path) -> None:
    doomed = path.with_name(f".tmp_discarded_{path.name}")
    os.replace(path, doomed)  # half removed must not look complete
    shutil.rmtree(doomed)


class _Writer:
    """What one rank writes, in one file, by whoever calls `write`."""

    def __init__(self, path: Path):
        self.path = path
        self.pieces: list[tuple[Piece, torch.dtype]] = []
        self.tensors: list[torch.Tensor] = []
        self.record: FileRecord = {}

    def take(self, tensors: Iterable[tuple[Piece, torch.Tensor]], copy: bool) -> None:
        """copy: to host memory, so that training may change the tensors before they are written."""
        for piece, tensor in tensors:
            self.pieces.append((piece, tensor.dtype))
            self.tensors.append(tensor.detach().to("cpu", copy=True) if copy else tensor.detach())

    def write(self) -> None:
        with Workers() as workers:
            self.record = write_pieces(self.path, self.pieces, self.tensors, workers)
        self.tensors = []


def _free_space(folder: Path) -> str:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return f"{folder} cannot be read."
    return f"The disk of {folder} has {usage.free / 2**30:.2f} of {usage.total / 2**30:.1f} GiB free."
