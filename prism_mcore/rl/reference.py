"""The reference policy: an fp32 shard per rank like the optimizer's masters, scored in the model's own buffers."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from prism_mcore.checkpoint.sharded import ShardedTensor, ShardedTensorFactory
from prism_mcore.parallel import Groups
from prism_mcore.train.optimizer import DistributedDataParallel, MegatronOptimizer, gather_parameters, own_ranges


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
        self._shards = [_Shard.of(*own) for own in own_ranges(optimizer)]

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

    # Checkpoints: whole tensors under the model's global names, so that they load in any layout.

    def sharded_state(self) -> dict[str, ShardedTensor | ShardedTensorFactory]:
        """The reference for a checkpoint, whole and on the CPU, under the names `reference.<global name>`.

        Every rank calls it. `load` takes the same back, filled.
        """
        described = {
            sharded.data: sharded for chunk in self.chunks for sharded in chunk.module.sharded_state_dict().values()
        }
        mine = {shard.parameter: shard for shard in self._shards}
        state = {}
        for parameter, sharded in described.items():
            whole = self._whole(parameter, mine.get(parameter))
            changes = {"key": f"reference.{sharded.key}", "data": whole}
            if isinstance(sharded, ShardedTensor):
                changes["dtype"] = whole.dtype
            state[f"reference.{sharded.key}"] = replace(sharded, **changes)
        return state

    def load(self, state: Mapping[str, ShardedTensor | ShardedTensorFactory]) -> None:
        """Take this rank's shards from what `sharded_state` described and a checkpoint filled."""
        whole = {key.removeprefix("reference."): sharded.data for key, sharded in state.items()}
        names = {tensor: name for chunk in self.chunks for name, tensor, _ in chunk.module.table()}
        for shard in self._shards:
            flat = whole[names[shard.parameter]].flatten()
            shard.reference.copy_(flat[shard.start : shard.start + len(shard.reference)])

    def _whole(self, parameter: Tensor, shard: _Shard | None) -> Tensor:
        """All of a parameter's reference, from the ranks that hold parts of it."""
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if shard is not None:
            whole[shard.start : shard.start + len(shard.reference)] = shard.reference
        # Added as integers: the others' zeros then change no bit, not even that of -0.
        dist.all_reduce(whole.view(torch.int32), group=self.chunks[0].intra_dp_cp_group)
        return whole.view(parameter.shape).cpu()


def _fold(data: Tensor, width: int = 1 << 20) -> Tensor:
    """[n] numbers -> [width] int64 sums of their bits, each taken with a weight that depends on its place."""
    bits = data.detach().view(torch.int16 if data.element_size() == 2 else torch.int32)
    folded = torch.zeros(min(width, len(bits)), dtype=torch.int64, device=data.device)
    for number, part in enumerate(bits.split(width), start=1):
        folded[: len(part)] += part.long() * (2 * number + 1)
    return folded.cpu()
