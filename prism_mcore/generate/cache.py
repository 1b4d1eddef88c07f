"""Memory of running sequences: how many of them fit, and which blocks of the paged cache belong to whom."""

# n blocks asked for

import os
from dataclasses import dataclass

import numpy as np
import psutil
import torch
import torch.distributed as dist

from prism_kernels.caches import PagedCache
from prism_mcore.model.hybrid import HybridModel
from prism_mcore.model.state import Cache, MambaCache

BLOCK_LEN = 64  # tokens; also the key block of exact mode's attention


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


SPARE = 2  # slots and blocks beyond the capacity: a prompt whose samples still wait, and rows that only fill a graph


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


class Blocks:
    """Which blocks are free, and how many sequences share each of the others.

    Blocks of one sequence are taken from the low end and those that a prompt's samples share from the high end: a
    decoding step then reads each of the two in long runs.
    """

    def __init__(self, count: int):
        self.owners = np.zeros(count, np.int32)

    @property
    def in_use(self) -> int:
        return int(np.count_nonzero(self.owners))

    def take(self, n: int, *, shared: bool = False) -> np.ndarray:
        """n free blocks [n] int64, owned once."""
        free = np.flatnonzero(self.owners == 0)
        assert len(free) >= n, f"{n} blocks wanted, {len(free)} of {len(self.owners)} free: they were set aside"
        taken = free[len(free) - n :][::-1] if shared else free[:n]
        self.owners[taken] = 1
        return taken

    def share(self, blocks: np.ndarray) -> None:
        self.owners[blocks] += 1

    def drop(self, blocks: np.ndarray) -> None:
        """One owner less for each; a block may be listed more than once."""
        np.subtract.at(self.owners, blocks, 1)


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
