"""Checkpoints into a running model of any layout: every rank reads the ranges that it needs, and nothing else."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from prism_mcore.agree import gather_failures
from prism_mcore.checkpoint.durable import damage
from prism_mcore.checkpoint.files import OnBytes
from prism_mcore.checkpoint.folder import CheckpointError, read_state
from prism_mcore.checkpoint.optimizer_state import own_state, set_optimizer_step
from prism_mcore.checkpoint.random_state import set_random_state
from prism_mcore.checkpoint.sharded import OPTIMIZER, Described, Owned, describe_model, layout, random_pieces
from prism_mcore.checkpoint.stored import MASTER, StoredTensors
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
    more: dict[str, Iterable[Owned]] | None = None,
    on_read: OnBytes = lambda size: None,
) -> Loaded:
    """Fill model and optimizer from a checkpoint of any layout; every rank calls it.

    more: what `save` was given under the same name, whose tensors are filled, too. on_read: told of every read's bytes.
    Does not verify the manifest: `newest_undamaged` or `damage` did. Random number generators continue only in the
    layout that saved them; in another they stay as they are.
    """
    record = read_state(path)
    failure = ""
    try:
        with StoredTensors(path, on_read=on_read) as stored:
            described = describe_model(chunks, groups)
            _fill_model(stored, described)
            for parameter, mine, state in own_state(optimizer, write=True):
                for name, tensor in state.items():
                    _fill(stored, described, f"{OPTIMIZER}{name}.", Owned(parameter, mine, tensor))
            for prefix, each in (more or {}).items():
                for owned in each:
                    _fill(stored, described, prefix, owned)
            same = record["layout"] == layout(groups) and _load_random_state(stored, groups.rank)
    except CheckpointError as error:
        failure = str(error)
    if failures := gather_failures(failure):
        raise CheckpointError(f"cannot load {path}: {'; '.join(sorted(set(failures)))}")
    set_optimizer_step(optimizer, record["optimizer_step"])
    if not same and groups.rank == 0:
        log.warning("%s was saved in the layout %s; random numbers start anew", path, record["layout"])
    return Loaded(path, record["step"], record["state"])


def load_weights(path: Path, chunks: Sequence[torch.nn.Module], groups: Groups) -> None:
    """Fill only the model from a checkpoint of any layout, as the start of a new run; every rank calls it.

    Raises CheckpointError, naming the file, where one is not as the manifest says, and where the model is another one.
    """
    problems = gather_failures("; ".join(damage(path, groups.rank, groups.world_size)))
    if problems:
        raise CheckpointError(f"cannot start from {path}: {'; '.join(problems)}")
    failure = ""
    try:
        with StoredTensors(path) as stored:
            _fill_model(stored, describe_model(chunks, groups))
    except CheckpointError as error:
        failure = str(error)
    if failures := gather_failures(failure):
        raise CheckpointError(f"cannot start from {path}: {failures[0]}")


def _fill_model(stored: StoredTensors, described: dict[Tensor, Described]) -> None:
    if difference := _first_difference(stored, described.values()):
        raise CheckpointError(f"it is of another model: {difference}")
    for parameter in described:
        _fill(stored, described, "", Owned(parameter, range(parameter.numel()), parameter.detach().view(-1)))


def _fill(stored: StoredTensors, described: dict[Tensor, Described], prefix: str, owned: Owned) -> None:
    """Read what belongs to a range of a parameter."""
    for piece, place in described[owned.parameter].cut(owned.mine):
        key = stored.master(piece.key) if prefix == MASTER else prefix + piece.key
        stored.read_piece(replace(piece, key=key), owned.tensor[place])


def _first_difference(stored: StoredTensors, model: Iterable[Described]) -> str:
    """A tensor that the checkpoint lacks, or has in another shape; empty where there is none."""
    for described in model:
        for part in described.parts:
            if part.key not in stored:
                return f"it has no {part.key}"
            found, rows = stored.shape(part.key), int(described.vocabulary)
            if found[rows:] != part.shape[rows:] or len(found) != len(part.shape):
                return f"{part.key} is {list(found)} there, {list(part.shape)} here"
    return ""


def _load_random_state(stored: StoredTensors, rank: int) -> bool:
    """Whether this rank's generators go on: a GPU's have states of another size than a CPU's."""
    pieces = list(random_pieces(rank))
    if not all(piece.key in stored and stored.shape(piece.key) == piece.shape for piece, _ in pieces):
        return False
    for piece, state in pieces:
        stored.read_piece(piece, state)
    set_random_state({piece.key.removeprefix(f"random.{rank}."): state for piece, state in pieces})
    return True
