"""The reference policy: an fp32 shard per rank like the optimizer's masters, scored in the model's own buffers."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_mcore.checkpoint.optimizer_state import own_ranges
from prism_mcore.checkpoint.sharded import Owned
from prism_mcore.parallel import Groups
from prism_mcore.train.optimizer import DistributedDataParallel, MegatronOptimizer, gather_parameters


@dataclass(frozen=True)
class _Shard:
    """This rank's elements of one parameter, [n] each: the range that its optimizer updates."""

    parameter: Tensor  # the model's, whole
    start: int  # of the range in the flattened parameter
    place: Tensor  # the range in the model's own buffer, in the model's format
    master: Tensor  # fp32; the place itself where the parameter is fp32
    reference: Tensor  # fp32

    @staticmethod
    def of(parameter: Tensor, mine: range, master: Tensor) -> "_Shard":
        place = parameter.detach().view(-1)[mine.start : mine.stop]
        return _Shard(parameter, mine.start, place, master, master.clone().float())

    @property
    def has_master(self) -> bool:
        return self.master.data_ptr() != self.place.data_ptr()

    def swap(self) -> None:
        """The reference to the model's place, and what is there to the reference's: both are fp32."""
        held = self.place.clone()
        self.place.copy_(self.reference)
        self.reference.copy_(held)


class Reference:
    """A copy of the policy as it is now, 4 bytes per parameter over the ranks that share the optimizer's state.

    It costs no second model: `in_place` casts and gathers it into the model's buffers for a while.
    """

    def __init__(self, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, groups: Groups):
        self.chunks, self.groups = chunks, groups
        self._shards = [
            _Shard.of(parameter, mine, master.detach()) for parameter, mine, master in own_ranges(optimizer)
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the reference's weights; afterwards it has its own again, to the bit.

        Its own come back from the optimizer's masters, which the model's weights are always a cast of; an fp32
        parameter has no other master, and its shard changes places with the reference's meanwhile. Every rank enters
        and leaves.
        """
        before = self._fingerprint()
        for shard in self._shards:
            shard.place.copy_(shard.reference) if shard.has_master else shard.swap()
        gather_parameters(self.chunks)
        try:
            yield
        finally:
            for shard in self._shards:
                shard.place.copy_(shard.master) if shard.has_master else shard.swap()
            gather_parameters(self.chunks)
            if self._fingerprint() != before:
                raise RuntimeError("the policy's weights are not what they were before the reference was scored")

    def update(self, alpha: float) -> None:
        """reference = alpha * policy + (1 - alpha) * reference: the soft update of TR-DPO, arXiv 2404.09656, eq. 3."""
        for shard in self._shards:
            shard.reference.lerp_(shard.master, alpha)

    def _fingerprint(self) -> str:
        """Of the bits of every parameter buffer on this rank."""
        digest = hashlib.sha256()
        for chunk in self.chunks:
            for buffer in chunk.buffers:
                digest.update(_fold(buffer.param_data).numpy().tobytes())
        return digest.hexdigest()

    def owned(self) -> list[Owned]:
        """This rank's shards, for a checkpoint to write under `reference.<global name>`, and to fill."""
        return [
            Owned(shard.parameter, range(shard.start, shard.start + len(shard.reference)), shard.reference)
            for shard in self._shards
        ]


def _fold(data: Tensor, width: int = 1 << 20) -> Tensor:
    """[n] numbers -> [width] int64 sums of their bits, each taken with a weight that depends on its place."""
    bits = data.detach().view(torch.int16 if data.element_size() == 2 else torch.int32)
    folded = torch.zeros(min(width, len(bits)), dtype=torch.int64, device=data.device)
    for number, part in enumerate(bits.split(width), start=1):
        folded[: len(part)] += part.long() * (2 * number + 1)
    return folded.cpu()
