"""One whole model that generates: its weights, the caches of its running sequences, and how many of these fit."""

import os
from dataclasses import dataclass, replace

import numpy as np
import psutil
import torch
import torch.distributed as dist

from prism_kernels.caches import PagedCache
from prism_kernels.loss.exact import token_logprobs
from prism_mcore.generate.sampler import Sampler, Vocabulary
from prism_mcore.generate.settings import TENSORWISE_GENERATION, EngineSettings, Sampling
from prism_mcore.model.hybrid import HybridModel
from prism_mcore.model.parameters import padded_vocabulary
from prism_mcore.model.state import Cache, MambaCache

BLOCK_LEN = 64  # tokens; also the key block of exact mode's attention
SPARE = 2  # slots and blocks beyond the capacity: a prompt whose samples still wait, and rows that only fill a graph


@dataclass(frozen=True)
class Capacity:
    """What the caches are made for: `Capacity(slots=128, blocks=700)`, both without what the engine itself needs."""

    slots: int  # sequences that run at once
    blocks: int  # of BLOCK_LEN tokens, over all running sequences


@dataclass(frozen=True)
class Costs:
    """Bytes on this rank, all layers together."""

    slot: int
    block: int

    @staticmethod
    def of(model: HybridModel) -> "Costs":
        caches = [cache for cache in model.caches(1, 1, BLOCK_LEN).values() if cache is not None]
        mamba = [x for cache in caches if isinstance(cache, MambaCache) for x in (cache.conv, cache.scan)]
        paged = [cache for cache in caches if isinstance(cache, PagedCache)]
        return Costs(sum(x.bytes_per_slot for x in mamba), sum(x.bytes_per_block for x in paged))


@dataclass(frozen=True)
class Caches:
    """The caches of all sub-layers, and the copies that forking a prompt takes."""

    layers: dict[str, Cache]
    bytes: int

    @staticmethod
    def allocate(model: HybridModel, room: Capacity, costs: Costs) -> "Caches":
        slots, blocks = room.slots + SPARE, room.blocks + SPARE
        return Caches(model.caches(slots, blocks, BLOCK_LEN), slots * costs.slot + blocks * costs.block)

    def copy_slots(self, source: torch.Tensor, target: torch.Tensor) -> None:
        for cache in self.layers.values():
            if isinstance(cache, MambaCache):
                cache.conv.copy(source, target)
                cache.scan.copy(source, target)

    def copy_blocks(self, source: torch.Tensor, target: torch.Tensor) -> None:
        for cache in self.layers.values():
            if isinstance(cache, PagedCache):
                cache.copy(source, target)


@dataclass(frozen=True)
class Statistics:
    """What a replica has done since it was made or reset."""

    prefilled_tokens: int = 0
    decoded_tokens: int = 0  # sampled ones, a prompt's first included
    steps: int = 0  # decoding passes
    slot_steps: int = 0  # slots in them, running or not
    running_steps: int = 0  # slots that ran
    cache_bytes: int = 0  # of the last stream


class Replica:
    """A HybridModel that is whole on this rank or its tensor-parallel group, and the memory its sequences live in."""

    def __init__(self, model: HybridModel, settings: EngineSettings):
        if not (model.pre_process and model.post_process):
            raise ValueError("generation needs the whole model on each rank; set parallel.pp=1")
        if model.context.fp8 and model.context.fp8.recipe == "tensorwise":
            raise ValueError(f"precision.fp8=tensorwise: {TENSORWISE_GENERATION}")
        self.model, self.settings, self.groups = model, settings, model.context.groups
        self.device = next(model.parameters()).device
        self.costs = Costs.of(model)
        self.statistics = Statistics()
        self._caches: tuple[Capacity, Caches] | None = None

    def capacity(self, needs: np.ndarray) -> Capacity:
        """How many sequences run at once, given the blocks of each at its longest [sequences]."""
        memory = cache_memory(self.settings.cache_gb, self.device, self.statistics.cache_bytes)
        return capacity(needs, self.costs, memory, self.settings.slots, self.groups.tp, self.device)

    def caches(self, room: Capacity) -> Caches:
        """Caches of at least this capacity; those of the last stream where they suffice."""
        made = self._caches
        if made is None or made[0].slots < room.slots or made[0].blocks < room.blocks:
            self._caches = None  # the old ones go first
            self._caches = made = room, Caches.allocate(self.model, room, self.costs)
        self.count(cache_bytes=made[1].bytes - self.statistics.cache_bytes)
        return made[1]

    def reset(self) -> None:
        """Free the caches and forget the statistics."""
        self._caches, self.statistics = None, Statistics()

    def count(self, **more: int) -> None:
        self.statistics = replace(
            self.statistics, **{name: getattr(self.statistics, name) + n for name, n in more.items()}
        )

    def sampler(self, sampling: Sampling) -> Sampler:
        """What draws tokens from `logits` at sampling.temperature."""
        spec, tp = self.model.spec, self.groups.tp_size
        exact = self.model.context.ops.uses_exact("lm_logits")
        return Sampler(
            Vocabulary.of(spec.vocab_size, padded_vocabulary(spec, tp), self.groups),
            greedy=sampling.temperature == 0,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            token_logprobs=token_logprobs if exact else None,
        )


def capacity(
    needs: np.ndarray, costs: Costs, memory: int, slots: int, tp: dist.ProcessGroup, device: torch.device
) -> Capacity:
    """The largest number of running sequences for `memory` bytes, the same on every tensor-parallel rank.

    needs [sequences]: blocks of each at its longest; slots: no more than these; device: where `tp` communicates. A
    sequence's blocks are set aside when it starts, so that none ever runs out of them. Raises ValueError where not even
    the longest fits.
    """
    longest, mean = int(needs.max()), float(needs.mean())
    spare = SPARE * (costs.slot + costs.block)
    fitting = int((memory - spare) // (costs.slot + mean * costs.block)) if costs.slot + costs.block else slots
    slots = max(1, min(slots, len(needs), fitting))
    blocks = min(int(needs.sum()), int(np.sort(needs)[-slots:].sum()))
    if costs.block:
        blocks = min(blocks, (memory - spare - slots * costs.slot) // costs.block)
    smallest = torch.tensor([slots, blocks], device=device)
    dist.all_reduce(smallest, dist.ReduceOp.MIN, group=tp)
    slots, blocks = smallest.tolist()
    if blocks < longest:
        needed = spare + costs.slot + longest * costs.block
        raise ValueError(
            f"generate.cache_gb: {memory / 1e9:.3g} GB of caches; a sequence of up to {longest * BLOCK_LEN:,} tokens"
            f" needs {needed / 1e9:.3g} GB; allow more, or set sampling.max_tokens lower"
        )
    return Capacity(slots, blocks)


def cache_memory(cache_gb: float | None, device: torch.device, held: int) -> int:
    """Bytes that caches may take on this rank; held: what those of the last stream do, which go on being ours."""
    if cache_gb is not None:
        return int(cache_gb * 1e9)
    if device.type == "cuda":
        # What training has freed is torch's, not the driver's.
        freed = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(held, (torch.cuda.mem_get_info(device)[0] + freed + held) // 2)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(held, (psutil.virtual_memory().available // ranks + held) // 4)
