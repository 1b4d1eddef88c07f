"""Tensors of a checkpoint into a running model, by an index that was checked and without opening any other pickle."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, StateDict
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
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from prism_mcore.checkpoint.index import CheckpointError


def load_tensors(wanted: ShardedStateDict, path: Path, index: Metadata) -> StateDict:
    """What `wanted` describes, from a checkpoint whose index `read_index` has read; every rank calls it.

    Raises CheckpointError, naming the file where it is one, for tensors that cannot be read.
    """
    try:
        return dist_checkpointing.load(wanted, str(path), _ByIndex(index), _NothingInCommon())
    except (CheckpointException, CheckpointingException) as error:
        raise CheckpointError(f"cannot load {path}: {_reasons(error)}") from error


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
