"""Checkpoints: whole or not at all, verified before they are opened, and loadable in any layout.

    <run>/checkpoints/
        step_00000100/           written as .tmp_step_00000100, synced, renamed when complete
            __0_0.distcp ...     tensors under their global names, megatron-core's torch_dist format
            .metadata            where each tensor is (torch's index, a pickle: read as data by checkpoint/index.py)
            metadata.json        megatron-core's name of the format
            common.pt            empty, and never opened; megatron-core wants it
            state.json           everything that is not a tensor
            manifest.json        size and SHA-256 of every file above
        latest                   the name of the newest complete one

Tensors are written by the rank's own process, or by a thread of it: megatron-core's writer processes need an unspoilt
__main__, and wait for ever when one of them dies.
"""

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
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
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from prism_mcore.agree import all_ranks, deadline, end_process, gather_failures
from prism_mcore.checkpoint.index import CheckpointError, read_index
from prism_mcore.checkpoint.load import load_tensors
from prism_mcore.parallel import Groups
from prism_mcore.train.manifest import FileRecord, damage, describe, sync_folder, write_atomically, write_manifest
from prism_mcore.train.random_state import get_random_state, set_random_state
from prism_mcore.train.settings import CheckpointSettings

FORMAT_VERSION = 1
STATE = "state.json"
LATEST = "latest"
DEADLINE = "checkpoint.save_deadline_s"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint held besides tensors."""

    path: Path
    step: int
    state: dict[str, Any]  # what was given to `save`


class Checkpoints:
    """The checkpoints of one run; every rank holds one and calls its methods at the same steps.

    folder: <run>/checkpoints, on a file system that all ranks see.
    """

    def __init__(self, folder: Path, settings: CheckpointSettings, groups: Groups):
        self.folder, self.settings, self.groups = folder, settings, groups
        self._pending: _Save | None = None

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
            save = _Save(self.folder, step, self.groups, self.settings.keep)
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


def step_name(step: int) -> str:
    """The folder of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def complete_steps(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step_" + "[0-9]" * 8) if path.is_dir())


def latest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, else the newest complete one; None where there is none."""
    steps = complete_steps(folder)
    with contextlib.suppress(FileNotFoundError):
        named = folder / (folder / LATEST).read_text(encoding="utf-8").strip()
        if named in steps:
            return named
        log.warning("%s names %s, which is not there", folder / LATEST, named.name)
    return steps[-1] if steps else None


# --- saving -----------------------------------------------------------------------------------------------------------


class _Save:
    """One save, in three parts: `plan` (all ranks together), `write` (each alone), `finish` (all ranks together)."""

    def __init__(self, folder: Path, step: int, groups: Groups, keep: int):
        self.folder, self.step, self.groups, self.keep = folder, step, groups, keep
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
                self.text = json.dumps(self._record(optimizer, state), indent=1, allow_nan=False)
                self._prepare_folder()
        tensors = _sharded_tensors(chunks, optimizer, self.groups, is_loading=False)
        tensors["random"], tensors["more"] = _sharded_random_state(self.groups.rank), more
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

    def _record(self, optimizer: MegatronOptimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "layout": _layout(self.groups),
            "optimizer_step": _optimizer_step(optimizer),
            "state": state,
        }

    def _prepare_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(".tmp_*"):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        self.temporary.mkdir()

    def _complete(self, results: list[list], records: dict[str, FileRecord]) -> None:
        """On rank 0, when every rank's tensors are on the disk: the small files, the manifest, the rename."""
        del self.index.all_local_plans  # megatron-core's cache of plans; not part of the index
        self.writer.finish(self.index, results)
        save_config(CheckpointingConfig("torch_dist", 1), str(self.temporary))
        torch.save({}, self.temporary / "common.pt")
        (self.temporary / STATE).write_text(self.text, encoding="utf-8")
        write_manifest(self.temporary, records)
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


# --- loading ----------------------------------------------------------------------------------------------------------


def newest_undamaged(folder: Path) -> Path | None:
    """The newest checkpoint whose every file is as its manifest says; None where there is no checkpoint at all.

    Every rank calls it, and the ranks share the hashing. Damage is logged by file name.
    """
    candidates: list[list[Path]] = [[]]
    if dist.get_rank() == 0:
        newest = latest(folder)
        candidates = [[path for path in reversed(complete_steps(folder)) if newest is not None and path <= newest]]
    dist.broadcast_object_list(candidates, src=0)
    for path in candidates[0]:
        problems = gather_failures("; ".join(damage(path, dist.get_rank(), dist.get_world_size())))
        if not problems:
            return path
        if dist.get_rank() == 0:
            log.error("NOT loading %s: %s. Trying the checkpoint before it.", path, "; ".join(sorted(set(problems))))
    if candidates[0]:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged, see the log; move the folder away to start from the beginning"
        )
    return None


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint: format_version, step, layout, optimizer_step, state; unknown versions are refused."""
    record = json.loads((path / STATE).read_text(encoding="utf-8"))
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this program reads version {FORMAT_VERSION}."
            " Load it with the version of prism_mcore that wrote it"
        )
    return record


def load(
    path: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    groups: Groups,
    more: ShardedStateDict | None = None,
) -> Loaded:
    """Fill the model (and the optimizer, if given) from a checkpoint of any layout; every rank calls it.

    more: what `save` was given under the same name, whose data is filled, too.
    Does not verify the manifest: `newest_undamaged` or `damage` did. Random number generators continue only in the
    layout that saved them; in another they stay as they are.
    """
    record = read_state(path)
    index = read_index(path)
    wanted = _sharded_tensors(chunks, optimizer, groups, is_loading=True)
    random_state, known = _sharded_random_state(groups.rank), index.state_dict_metadata
    # A GPU's generators have states of another size than a CPU's.
    same = all(s.key in known and known[s.key].size == s.data.shape for s in random_state.values())
    if same and record["layout"] == _layout(groups):
        wanted["random"] = random_state
    elif groups.rank == 0:
        log.warning("%s was saved in the layout %s; random numbers start anew", path, record["layout"])
    wanted["more"] = dict(more or {})
    places = {part: {name: sharded.data for name, sharded in wanted[part].items()} for part in ("model", "more")}
    loaded = load_tensors(wanted, path, index)
    for part, tensors in places.items():
        _fill(tensors, loaded.get(part, {}))  # megatron-core drops what is empty
    _load_optimizer(optimizer, loaded["optimizer"], record["optimizer_step"])
    if "random" in loaded:
        set_random_state(loaded["random"])
    return Loaded(path, record["step"], record["state"])


def load_weights(path: Path, chunks: Sequence[torch.nn.Module], groups: Groups) -> None:
    """Fill only the model from a checkpoint of any layout, as the start of a new run; every rank calls it.

    Raises CheckpointError, naming the file, where one is not as the manifest says, and where the model is another one.
    """
    problems = gather_failures("; ".join(damage(path, groups.rank, groups.world_size)))
    if problems:
        raise CheckpointError(f"cannot start from {path}: {'; '.join(problems)}")
    read_state(path)
    wanted = _sharded_tensors(chunks, None, groups, is_loading=True)
    index = read_index(path)
    if problems := gather_failures(_first_difference(wanted["model"], index)):
        raise CheckpointError(f"cannot start from {path}, which is of another model: {problems[0]}")
    weights = {name: sharded.data for name, sharded in wanted["model"].items()}
    _fill(weights, load_tensors(wanted, path, index)["model"])


def _first_difference(model: ShardedStateDict, index: Metadata) -> str:
    """A tensor that the checkpoint lacks, or has in another shape; empty where there is none."""
    for sharded in model.values():
        for piece in sharded.build() if isinstance(sharded, ShardedTensorFactory) else [sharded]:
            found = index.state_dict_metadata.get(piece.key)
            if found is None:
                return f"it has no {piece.key}"
            if tuple(found.size) != tuple(piece.global_shape) and not piece.allow_shape_mismatch:
                return f"{piece.key} is {list(found.size)} there, {list(piece.global_shape)} here"
    return ""


# --- what is in a checkpoint ------------------------------------------------------------------------------------------


def _sharded_tensors(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, groups: Groups, is_loading: bool
) -> dict[str, Any]:
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": groups.dp_cp}
    model: dict[str, Any] = {}
    for chunk in unwrap_model(list(chunks)):  # names without the wrappers' "module."
        model.update(chunk.sharded_state_dict(metadata=metadata))
    tensors: dict[str, Any] = {"model": model}
    if optimizer is not None:
        initialise_state(optimizer)
        state = _only(optimizer).sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        # The rest of it is hyper-parameters, which come from the settings, and the step, which is in state.json.
        tensors["optimizer"] = state["param_state"]
    return tensors


@torch.no_grad()
def _fill(weights: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> None:
    """Copy what was loaded into the model; plain tensors were read in place, those cut into parts were not."""
    for name, weight in weights.items():
        if loaded[name].data_ptr() != weight.data_ptr():
            weight.copy_(loaded[name])


def _sharded_random_state(rank: int) -> dict[str, ShardedTensor]:
    state = get_random_state()
    return {name: ShardedTensor.from_rank_offsets(f"random.{rank}.{name}", value) for name, value in state.items()}


def _layout(groups: Groups) -> dict[str, int]:
    fields = ("tp_size", "pp_size", "vpp", "dp_size", "cp_size")
    return {field.removesuffix("_size"): getattr(groups, field) for field in fields}


def _only(optimizer: MegatronOptimizer) -> Any:
    if isinstance(optimizer, ChainedOptimizer):
        (optimizer,) = optimizer.chained_optimizers
    return optimizer


def initialise_state(optimizer: MegatronOptimizer) -> None:
    """Zero moments where no step was taken yet: megatron-core cannot describe the state of an untouched optimizer."""
    distributed = _only(optimizer)
    inner = distributed.optimizer
    if inner.state:
        return
    distributed.init_state_fn(inner, distributed.config)
    if isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
        for group in inner.param_groups:
            for parameter in group["params"]:
                device = parameter.device if group["fused"] or group["capturable"] else None
                inner.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=device)


def _optimizer_step(optimizer: MegatronOptimizer) -> int:
    """Updates taken: torch's Adam counts them for each parameter, Transformer Engine's and apex's for each group."""
    inner = _only(optimizer).optimizer
    counts = [state["step"] for state in inner.state.values() if "step" in state]
    counts = counts or [group["step"] for group in inner.param_groups if "step" in group]
    return max((int(count) for count in counts), default=0)


def _load_optimizer(optimizer: MegatronOptimizer, param_state: dict[int, Any], step: int) -> None:
    distributed = _only(optimizer)
    state = distributed.state_dict()
    for group in state["optimizer"]["param_groups"]:
        group["step"] = step
    state["param_state"], state["param_state_sharding_type"] = param_state, "fully_reshardable"
    distributed.load_state_dict(state)
    # megatron-core gives all parameters one tensor, and none where Transformer Engine or apex is installed.
    for own in distributed.optimizer.state.values():
        if "step" in own:
            own["step"] = torch.full_like(own["step"], step)


def _free_space(folder: Path) -> str:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return f"{folder} cannot be read."
    return f"The disk of {folder} has {usage.free / 2**30:.2f} of {usage.total / 2**30:.1f} GiB free."
