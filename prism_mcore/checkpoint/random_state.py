"""Every random number generator of a rank as tensors of fixed shapes, so that a resumed run draws the same numbers."""

import random
from typing import Any

import numpy
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

RandomState = dict[str, Tensor]


def get_random_state() -> RandomState:
    """The states of Python's, numpy's and torch's generators and of megatron-core's tracker; on the CPU."""
    state = {"python": _from_python(), "numpy": _from_numpy(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    for name, tracked in get_cuda_rng_tracker().get_states().items():
        state[f"tracker.{name}"] = tracked.clone()
    return state


def set_random_state(state: RandomState) -> None:
    """Put back what `get_random_state` returned in a process with the same generators."""
    _to_python(state["python"])
    _to_numpy(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    prefix = "tracker."
    tracked = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    get_cuda_rng_tracker().set_states(tracked)


def _pack(words: list[int], flag: int, number: float | None) -> Tensor:
    bits = torch.tensor([0.0 if number is None else number], dtype=torch.float64).view(torch.int64)
    return torch.cat([torch.tensor([*words, flag, int(number is not None)], dtype=torch.int64), bits])


def _unpack(tensor: Tensor) -> tuple[list[int], int, float | None]:
    *words, flag, has_number = tensor[:-1].tolist()
    return words, flag, tensor[-1:].view(torch.float64).item() if has_number else None


def _from_python() -> Tensor:
    version, words, gauss = random.getstate()
    return _pack(list(words), version, gauss)


def _to_python(tensor: Tensor) -> None:
    words, version, gauss = _unpack(tensor)
    random.setstate((version, tuple(words), gauss))


def _from_numpy() -> Tensor:
    state: Any = numpy.random.get_state(legacy=True)
    _, words, position, has_gauss, gauss = state
    return _pack(words.tolist(), position, gauss if has_gauss else None)


def _to_numpy(tensor: Tensor) -> None:
    words, position, gauss = _unpack(tensor)
    array = numpy.array(words, dtype=numpy.uint32)
    numpy.random.set_state(("MT19937", array, position, int(gauss is not None), gauss or 0.0))
