"""What ranks tell each other: sums, flags, failures, deadlines. A step costs one reduction and one wait."""

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from prism_mcore.exit_codes import FAILED


def summed(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every name's sum over all ranks, on the CPU in fp64: one reduction and one wait for the device for all of them.

    sums: the same names and shapes on every rank; a rank that has nothing to add gives zeros.
    """
    flat = torch.cat([value.flatten().double() for value in sums.values()])
    dist.all_reduce(flat)
    parts = flat.cpu().split([value.numel() for value in sums.values()])
    return {name: part.view(value.shape) for part, (name, value) in zip(parts, sums.items(), strict=True)}


def all_ranks(flag: bool) -> bool:
    """Is it so on every rank? Every rank calls it and gets the same answer."""
    here = torch.tensor(int(flag), device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(here, op=dist.ReduceOp.MIN)
    return bool(here.item())


def gather_failures(failure: str) -> list[str]:
    """Every rank's message where there is one; a single small reduction when all is well."""
    if all_ranks(not failure):
        return []
    failures: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    return [text for text in failures if text]


@contextlib.contextmanager
def deadline(seconds: float, what: str, setting: str) -> Iterator[None]:
    """End the process with exit code FAILED when the block takes longer: a rank that hangs must not hold the others.

    setting: the name of the setting that `seconds` come from.
    """
    timer = threading.Timer(max(seconds, 1.0), end_process, (what, seconds, setting))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end_process(what: str, seconds: float, setting: str) -> None:
    """Say what was not done in time and where every thread is, and end without waiting for anything."""
    print(f"{what} was not done after {seconds:.0f} s ({setting}); ending the run", file=sys.stderr)
    faulthandler.dump_traceback(file=sys.stderr)
    sys.stderr.flush()
    os._exit(FAILED)
