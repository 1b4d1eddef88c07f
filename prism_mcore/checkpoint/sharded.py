"""What of the model's and the optimizer's tensors a rank has, by global name, as pieces of the whole tensors."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch import Tensor

from prism_mcore.checkpoint.optimizer_state import own_state
from prism_mcore.checkpoint.places import Piece
from prism_mcore.checkpoint.random_state import get_random_state
from prism_mcore.checkpoint.stored import MASTER
from prism_mcore.parallel import Groups

OPTIMIZER = MASTER.removesuffix("param.")  # before "exp_avg." and the like


class Owned(NamedTuple):
    """Elements of a flattened parameter, and what belongs to them: a tensor of as many."""

    parameter: Tensor
    mine: range
    tensor: Tensor


@dataclass(frozen=True)
class Described:
    """A rank's part of a parameter: the keys it consists of, one after the other."""

    parts: tuple[Piece, ...]
    vocabulary: bool  # its rows may be more than another layout's
    written: bool  # on this rank; others have it, too

    def cut(self, mine: range) -> Iterator[tuple[Piece, slice]]:
        """The pieces of a range of the flattened parameter, and their places in the range."""
        first = 0
        for part in self.parts:
            start, stop = max(mine.start, first), min(mine.stop, first + part.count)
            if start < stop:
                yield (
                    replace(part, start=start - first, stop=stop - first),
                    slice(start - mine.start, stop - mine.start),
                )
            first += part.count


def describe_model(chunks: Sequence[torch.nn.Module], groups: Groups) -> dict[Tensor, Described]:
    """Every parameter of this rank, from megatron-core's description of it."""
    found = {}
    for chunk in unwrap_model(list(chunks)):  # names without the wrappers' "module."
        for sharded in chunk.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp}).values():
            cut = sharded.build() if isinstance(sharded, ShardedTensorFactory) else [sharded]
            parts = tuple(Piece.of_box(p.key, p.global_shape, p.global_offset, p.local_shape) for p in cut)
            assert all(p.data.is_contiguous() for p in cut), (
                f"{sharded.key} has parts along another axis than its first"
            )
            # The last number of a replica is its data-parallel rank, and those share the writing.
            first = not any(sharded.replica_id[:-1])
            found[sharded.data] = Described(parts, any(p.allow_shape_mismatch for p in cut), first)
    return found


def own_tensors(
    described: dict[Tensor, Described],
    optimizer: MegatronOptimizer,
    groups: Groups,
    more: dict[str, Iterable[Owned]],
) -> Iterator[tuple[Piece, Tensor]]:
    """What this rank writes: its own ranges, so that ranks together write everything once; and its random numbers.

    more: other tensors over parameters, by what is before their keys.
    """
    if groups.dp_cp.rank() < groups.collection.intra_dp_cp.size():  # later ones are replicas of the optimizer
        for prefix, owned in [*_of_optimizer(optimizer), *((p, one) for p, each in more.items() for one in each)]:
            if described[owned.parameter].written:
                for piece, place in described[owned.parameter].cut(owned.mine):
                    yield replace(piece, key=prefix + piece.key), owned.tensor[place]
    yield from random_pieces(groups.rank)


def random_pieces(rank: int) -> Iterator[tuple[Piece, Tensor]]:
    """The states of this rank's generators, under names of its own."""
    for name, state in get_random_state().items():
        shape = tuple(state.shape)
        yield Piece.of_box(f"random.{rank}.{name}", shape, (0,) * len(shape), shape), state


def _of_optimizer(optimizer: MegatronOptimizer) -> Iterator[tuple[str, Owned]]:
    for parameter, mine, state in own_state(optimizer):
        weight = parameter.detach().view(-1)[mine.start : mine.stop]
        yield "", Owned(parameter, mine, weight)
        for name, tensor in state.items():
            if tensor.data_ptr() != weight.data_ptr():  # an fp32 weight is its own master
                yield f"{OPTIMIZER}{name}.", Owned(parameter, mine, tensor)


def layout(groups: Groups) -> dict[str, int]:
    """The degrees in which a checkpoint was saved."""
    fields = ("tp_size", "pp_size", "vpp", "dp_size", "cp_size")
    return {field.removesuffix("_size"): getattr(groups, field) for field in fields}
