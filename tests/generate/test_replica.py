"""How much memory caches may take, and who has to agree on it."""

from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from prism_mcore.generate.replica import Costs, cache_memory, capacity

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GB = 2**30


class Device:
    """A GPU of 80 GB as torch and the driver see it."""

    def __init__(self, monkeypatch):
        self.allocated = self.reserved = 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (80 * GB - self.reserved, 80 * GB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: self.reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: self.allocated)


def test_caches_do_not_shrink_where_training_has_used_the_rest_since(monkeypatch):
    """torch keeps the memory of activations: to the driver a GPU is full after the first training step."""
    gpu = Device(monkeypatch)
    gpu.allocated = gpu.reserved = 20 * GB  # weights and gradients
    first = cache_memory(None, GPU, 0)
    assert first == 30 * GB
    gpu.allocated, gpu.reserved = 20 * GB + first, 79 * GB
    assert cache_memory(None, GPU, first) == first
    gpu.allocated += 10 * GB  # moments, which the first step makes
    assert cache_memory(None, GPU, first) == first
    gpu.allocated -= first
    assert cache_memory(None, GPU, 0) == 25 * GB


def test_a_cpus_caches_are_a_quarter_of_what_is_free_beside_them(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GB))
    assert cache_memory(None, CPU, 0) == 8 * GB and cache_memory(None, CPU, 8 * GB) == 10 * GB
    assert cache_memory(1.5, CPU, 8 * GB) == 1_500_000_000


class Reduced(Exception):
    pass


def test_ranks_agree_where_they_communicate(monkeypatch):
    """NCCL takes no tensor of the CPU."""

    def reduce(tensor, *_, **__):
        raise Reduced(tensor.device.type)

    monkeypatch.setattr(dist, "all_reduce", reduce)
    with pytest.raises(Reduced, match="meta"):
        capacity(np.array([2, 3]), Costs(10, 10), 1000, 4, None, torch.device("meta"))
