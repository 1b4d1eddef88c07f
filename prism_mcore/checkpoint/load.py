"""Checkpoints into a running model of any layout, by an index that was checked and without opening any other pickle."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory, StateDict
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from prism_mcore.agree import gather_failures
from prism_mcore.checkpoint.durable import damage, read_object
from prism_mcore.checkpoint.folder import CheckpointError, read_state
from prism_mcore.checkpoint.index import read_index
from prism_mcore.checkpoint.optimizer_state import load_optimizer
from prism_mcore.checkpoint.random_state import set_random_state, sharded_random_state
from prism_mcore.checkpoint.sharded import fill, layout, sharded_tensors
from prism_mcore.parallel import Groups

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint held besides tensors."""

    path: Path
    step: int
    state: dict[str, Any]  # what was given to `save`


def load(
    path: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    groups: Groups,
    more: ShardedStateDict | None = None,
) -> Loaded:
    """Fill model and optimizer from a checkpoint of any layout; every rank calls it.

    more: what `save` was given under the same name, whose data is filled, too.
    Does not verify the manifest: `newest_undamaged` or `damage` did. Random number generators continue only in the
    layout that saved them; in another they stay as they are.
    """
    record = read_state(path)
    index = read_index(path)
    wanted = sharded_tensors(chunks, optimizer, groups, is_loading=True)
    random_state, known = sharded_random_state(groups.rank), index.state_dict_metadata
    # A GPU's generators have states of another size than a CPU's.
    same = all(s.key in known and known[s.key].size == s.data.shape for s in random_state.values())
    if same and record["layout"] == layout(groups):
        wanted["random"] = random_state
    elif groups.rank == 0:
        log.warning("%s was saved in the layout %s; random numbers start anew", path, record["layout"])
    wanted["more"] = dict(more or {})
    places = {part: {name: sharded.data for name, sharded in wanted[part].items()} for part in ("model", "more")}
    loaded = load_tensors(wanted, path, index)
    for part, tensors in places.items():
        fill(tensors, loaded.get(part, {}))  # megatron-core drops what is empty
    load_optimizer(optimizer, loaded["optimizer"], record["optimizer_step"])
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
    wanted = sharded_tensors(chunks, None, groups, is_loading=True)
    index = read_index(path)
    if problems := gather_failures(_first_difference(wanted["model"], index)):
        raise CheckpointError(f"cannot start from {path}, which is of another model: {problems[0]}")
    weights = {name: sharded.data for name, sharded in wanted["model"].items()}
    fill(weights, load_tensors(wanted, path, index)["model"])


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


def load_tensors(wanted: ShardedStateDict, path: Path, index: Metadata) -> StateDict:
    """What `wanted` describes, from a checkpoint whose index `read_index` has read; every rank calls it.

    Raises CheckpointError, naming the file where it is one, for tensors that cannot be read.
    """
    _check_format(path)
    try:
        return dist_checkpointing.load(wanted, str(path), _ByIndex(index), _NothingInCommon())
    except (CheckpointException, CheckpointingException) as error:
        raise CheckpointError(f"cannot load {path}: {_reasons(error)}") from error


def _check_format(path: Path) -> None:
    """megatron-core reads its own small file as it comes."""
    file = path / "metadata.json"
    try:
        config = CheckpointingConfig(**read_object(file))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if config.sharded_backend != "torch_dist":
        raise CheckpointError(f"{file} says the format {config.sharded_backend!r:.80}; needed: 'torch_dist'")


def _reasons(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # of some ranks, each with its traceback
        return "; ".join(sorted({str(failure) for failure, _ in error.failures.values()}))
    return str(error)


class _NothingInCommon(TorchCommonLoadStrategy):
    """Leaves common.pt closed: megatron-core would load it as a pickle, and ours is empty."""

    def load_common(self, checkpoint_dir: Any) -> StateDict:
        return {}


class _ByIndex(TorchDistLoadShardedStrategy):
    """megatron-core's way to load tensors, with an index that is given: its own opens the pickle."""

    def __init__(self, index: Metadata):
        super().__init__()
        self.index = index

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> StateDict:
        by_key, places, names = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        sharded = [piece for pieces in by_key.values() for piece in pieces]
        resizable = {piece.key: piece for piece in sharded if piece.allow_shape_mismatch}
        tensors = mcore_to_pyt_state_dict(by_key, True)
        planner = MCoreLoadPlanner(
            shapes_validation_sharded_tensors=[piece for piece in sharded if not piece.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors=resizable,
        )
        with warnings.catch_warnings():  # its successor `load` gathers every rank's names first, which differ here
            warnings.simplefilter("ignore", FutureWarning)
            torch_checkpoint.load_state_dict(tensors, _Reader(checkpoint_dir, self.index), planner=planner)
        plain = {key: _unwrap_pyt_sharded_tensor(tensor) for key, tensor in tensors.items()}
        loaded = _replace_sharded_keys_with_state_dict_keys(plain, places, names)
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded


class _Reader(torch_checkpoint.FileSystemReader):
    """torch's reader with an index that is given, and errors that name the file."""

    def __init__(self, path: Path, index: Metadata):
        super().__init__(path)
        self.index = replace(index, storage_meta=StorageMeta(load_id=self.load_id))

    def read_metadata(self) -> Metadata:
        return self.index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for file, items in self._by_file(plan):
            try:
                super().read_data(replace(plan, items=items), planner)
            except Exception as error:
                raise CheckpointError(f"{self.path / file}: {error}") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _by_file(self, plan: LoadPlan) -> Iterator[tuple[str, list[ReadItem]]]:
        def file_of(item: ReadItem) -> str:
            return self.storage_data[item.storage_index].relative_path

        for file, items in groupby(sorted(plan.items, key=file_of), file_of):
            yield file, list(items)
