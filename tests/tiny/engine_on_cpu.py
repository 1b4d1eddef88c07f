"""The real Transformer Engine on a CPU: `prepare()` before megatron-core is imported, then its FP8 linears run.

Its modules ask whether there is a GPU, and are told so while they ask; nothing that computes is changed. What runs is
its own: linears, contexts, communication, its reference quantisers and their products. A CPU has no kernel for the
rest: products without FP8, norms, attention, the optimizer.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch


class H100:
    """What is asked of a device's properties."""

    major, minor, multi_processor_count, name, total_memory = 9, 0, 132, "H100", 80 << 30


def prepare() -> None:
    """Import it, which megatron-core would otherwise not be let to on a CPU, and answer what its modules ask."""
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule as Base

    for name in ("__init__", "prepare_forward"):
        setattr(Base, name, told(getattr(Base, name)))
    torch.cuda.get_device_properties = lambda device=None: H100
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.is_current_stream_capturing = lambda: False
    for name in ("range_push", "range_pop"):  # marks for a profiler
        setattr(torch.cuda.nvtx, name, lambda *text: None)


def told(function: Callable) -> Callable:
    @functools.wraps(function)
    def asking(*args, **kwargs):
        with there_is_a_gpu():
            return function(*args, **kwargs)

    return asking


@contextmanager
def there_is_a_gpu() -> Iterator[None]:
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.Tensor, "is_cuda", True),
    ):
        yield
