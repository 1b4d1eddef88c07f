"""Saving a checkpoint: every rank writes its own tensors, rank 0 the rest, and what is not whole gets no name.

Tensors are written by the rank's own process, or by a thread of it: megatron-core's writer processes need an unspoilt
__main__, and wait for ever when one of them dies.
"""

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from prism_mcore.agree import all_ranks, deadline, end_process, gather_failures
from prism_mcore.checkpoint.durable import FileRecord, describe, sync_folder, write_atomically
from prism_mcore.checkpoint.folder import (
    LATEST,
    CheckpointError,
    complete,
    complete_steps,
    state_text,
    step_name,
)
from prism_mcore.checkpoint.optimizer_state import optimizer_step
from prism_mcore.checkpoint.random_state import sharded_random_state
from prism_mcore.checkpoint.settings import CheckpointSettings
from prism_mcore.checkpoint.sharded import layout, sharded_tensors
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
        more: ShardedStateDict | None = None,
    ) -> None:
        """Write weights, optimizer, random numbers and `state` (JSON) as the checkpoint after `step` steps.

        more: other sharded tensors by name, such as those of RL's reference policy.
        With checkpoint.async_save it returns once everything is copied, and `poll` completes it.
        Raises CheckpointError on all ranks where one cannot write; older checkpoints are untouched. A save that is not
        done after checkpoint.save_deadline_s ends the process.
        """
        self.wait()
        with deadline(self.settings.save_deadline_s, f"saving {self.folder / step_name(step)}", DEADLINE):
            save = _Save(self.folder, step, self.groups, self.settings.keep, self._meeting)
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

    def __init__(self, folder: Path, step: int, groups: Groups, keep: int, meeting: Meeting):
        self.folder, self.step, self.groups, self.keep, self.meeting = folder, step, groups, keep, meeting
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
        more: ShardedStateDict,
        copy: bool,
    ) -> None:
        with self._agreed():
            if self.groups.rank == 0:
                self.text = state_text(self.step, layout(self.groups), optimizer_step(optimizer), state)
                self._prepare_folder()
        tensors = sharded_tensors(chunks, optimizer, self.groups, is_loading=False)
        tensors["random"], tensors["more"] = sharded_random_state(self.groups.rank), more
        sharded, _ = save_preprocess(tensors)
        # Data-parallel replicas share the writing.
        FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy("torch_dist", 1), self.groups.dp_cp
        ).apply_saving_parallelization(sharded)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        self.writer = _Writer(self.temporary, copy)
        (_, self.index, _), *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(by_key),
            self.writer,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )

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
        written: list[tuple[list, dict[str, FileRecord]]] = [([], {})] * self.groups.world_size
        dist.all_gather_object(written, (self.writer.results, self.writer.records))
        with self._agreed():
            if self.groups.rank == 0:
                self._complete(
                    [results for results, _ in written], dict(r for _, records in written for r in records.items())
                )
        if self.groups.rank == 0:
            log.info("saved %s in %.1f s", self.path, self.age_s)

    def _prepare_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(".tmp_*"):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        self.temporary.mkdir()

    def _complete(self, results: list[list], records: dict[str, FileRecord]) -> None:
        """On rank 0, when every rank's tensors are on the disk: the small files, the manifest, the rename."""
        del self.index.all_local_plans  # megatron-core's cache of plans; not part of the index
        self.writer.finish(self.index, results)
        complete(self.temporary, self.text, records)
        if self.path.exists():  # the run went back to an earlier step, and has come here again
            _discard(self.path)
        os.replace(self.temporary, self.path)
        sync_folder(self.folder)
        write_atomically(self.folder / LATEST, self.path.name)
        self._remove_old()

    def _remove_old(self) -> None:
        older = [path for path in complete_steps(self.folder) if path < self.path]
        for path in older[: max(0, len(older) + 1 - self.keep)] if self.keep else []:
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


class _Writer(FileSystemWriterAsync):
    """megatron-core's writer without its processes: one file per rank, written by whoever calls `write`.

    copy: copy tensors that training goes on to change, so that `write` may run meanwhile.
    """

    def __init__(self, folder: Path, copy: bool):
        super().__init__(folder, thread_count=1)
        self.copy = copy
        self.results: list[Any] = []
        self.records: dict[str, FileRecord] = {}
        self.items: list[tuple[WriteItem, torch.Tensor]] = []

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        self.file_name = f"{plan.storage_data.prefix}0.distcp"
        self.items = [(item, self._staged(item, planner.resolve_data(item))) for item in plan.items]

    def _staged(self, item: WriteItem, tensor: torch.Tensor) -> torch.Tensor:
        # The optimizer's tensors and the reference's were gathered for this save; weights are what training changes.
        copy = self.copy and not item.index.fqn.startswith(("optimizer.", "reference."))
        return tensor.detach().to("cpu", copy=True) if copy else tensor.detach()

    def write(self) -> None:
        if not self.items:
            return
        path = Path(self.path) / self.file_name
        with _ErrorKeepingFile(path) as stream:
            for item, tensor in self.items:
                self.results.append(self._write_one(stream, item, tensor.cpu()))
            stream.flush()
            os.fsync(stream.fileno())
        self.items = []
        self.records[self.file_name] = describe(path)

    def _write_one(self, stream: "_ErrorKeepingFile", item: WriteItem, tensor: torch.Tensor) -> Any:
        if tensor.untyped_storage().size() != tensor.numel() * tensor.itemsize:
            tensor = tensor.clone()  # torch.save would write the whole buffer that this is a view of
        try:
            return _write_item(
                self.transforms,
                stream,
                tensor,
                item,
                self.file_name,
                serialization_format=SerializationFormat.TORCH_SAVE,
            )
        except RuntimeError as error:
            raise stream.error or error from error


class _ErrorKeepingFile:
    """A file for torch.save, which turns "No space left on device" into an assertion about positions."""

    def __init__(self, path: Path):
        self.file = open(path, "wb")  # noqa: SIM115
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "_ErrorKeepingFile":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError) if error[0] else contextlib.nullcontext():
            self.file.close()


def _free_space(folder: Path) -> str:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return f"{folder} cannot be read."
    return f"The disk of {folder} has {usage.free / 2**30:.2f} of {usage.total / 2**30:.1f} GiB free."
