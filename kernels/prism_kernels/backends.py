"""Which backend each op uses on a device, decided once at start from the table, and the function behind it."""

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from typing import Any

import torch

from prism_kernels import interpreter
from prism_kernels.table import BACKENDS, BATCH_INVARIANT, OPS, check_choices, place

log = logging.getLogger(__name__)


class Uncovered(ValueError):
    """A kernel does not cover these inputs (dtype, head_dim, alignment); raised before anything is launched."""


@dataclass(frozen=True)
class SelectedBackend:
    """`SelectedBackend("reference", "the only one here for this op on cpu", batch_invariant=False)`."""

    name: str
    reason: str
    batch_invariant: bool  # see table.BATCH_INVARIANT


def select(overrides: Mapping[str, str], device: torch.device | str) -> dict[str, SelectedBackend]:
    """One backend per op, with the reason; `overrides` (op -> backend, "auto" for our choice) are obeyed or refused.

    On a CPU, Triton's kernels run in its interpreter, which is for tests: only when asked for, with TRITON_INTERPRET=1.
    Raises ValueError for an unknown op, and for a backend that the op does not have or that cannot run here.
    """
    check_choices(overrides)
    return {op: _select(op, overrides.get(op, "auto"), torch.device(device)) for op in OPS}


def _select(op: str, wanted: str, device: torch.device) -> SelectedBackend:
    missing = {backend: why_not(backend, device) for backend in OPS[op].backends}
    available = [backend for backend, why in missing.items() if why is None]
    if wanted == "auto":
        on_request = {"exact"} | (set() if device.type == "cuda" else {"triton"})
        candidates = [backend for backend in available if backend not in on_request]
        first = "the first in order of preference" if len(candidates) > 1 else "the only one"
        wanted, reason = candidates[0], f"{first} here for this op on {device.type}"
    elif wanted in available:
        reason = f"asked for by kernels.{op}"
    else:
        here = ", ".join(available)
        raise ValueError(f"kernels.{op}={wanted}: not available; available are {here}; {missing[wanted]}")
    return SelectedBackend(wanted, reason, (op, wanted) in BATCH_INVARIANT)


def why_not(backend: str, device: torch.device) -> str | None:
    """Why this backend cannot run here, or None."""
    if missing := missing_module(backend):
        return f"{missing} is not installed: {BACKENDS[backend].install}"
    if device.type == "cuda" and backend == "exact":
        return "its bits are promised on a CPU only"
    if device.type != "cuda" and BACKENDS[backend].gpu_only:
        return f"it needs a GPU, the device is {device.type}"
    if device.type != "cuda" and backend == "triton" and not interpreter.active():
        return f"it needs a GPU, or TRITON_INTERPRET=1; the device is {device.type}"
    return None


def missing_module(backend: str) -> str | None:
    """The first of the modules that this backend calls which is not installed, or None."""
    modules = (needed.split("|") for needed in BACKENDS[backend].needs)
    return next((either[0] for either in modules if not any(map(_is_installed, either))), None)


def _is_installed(module: str) -> bool:
    """Can this module be imported, as far as files tell? Nothing is: a package of the same name may be anyone's."""
    first, *rest = module.split(".")
    found = (finder.find_spec(first, None) for finder in sys.meta_path)
    spec = next((spec for spec in found if spec is not None), None)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return False  # not there, or what should hold it is a module, no package
        # By its last name: of a folder without an __init__ Python would look up the parent among imported modules.
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    return spec is not None


def function(op: str, backend: str) -> Callable[..., Any]:
    """The function behind an op; where a kernel does not cover its inputs the reference is called, with one warning."""
    implementation = _imported(op, backend)
    if backend in ("reference", "exact"):
        return implementation
    if backend == "triton" and interpreter.active():
        interpreter.install()
    return _with_fallback(op, implementation, _imported(op, "reference"))


def _imported(op: str, backend: str) -> Callable[..., Any]:
    where = place(op, backend)
    if where is None:
        raise LookupError(f"{op} of {backend} is no function but a class of that library")
    module, name = where
    return getattr(importlib.import_module(module), name)


def _with_fallback(op: str, kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    warned: set[str] = set()

    @functools.wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return kernel(*args, **kwargs)
        except Uncovered as reason:
            if str(reason) not in warned:
                warned.add(str(reason))
                log.warning("%s: %s; plain torch is used instead", op, reason)
        return reference(*args, **kwargs)

    return call
