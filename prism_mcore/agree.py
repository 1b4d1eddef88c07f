"""What ranks tell each other: sums, flags, failures, deadlines. A step costs one reduction and one wait."""

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from uuid import uuid4

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


class Flag:
    """What any rank raises and every rank can see at any time, without a collective: a key in the store of the ranks.

    Every rank makes it together. A question costs one message to the store's host, some 0.1 ms.
    """

    def __init__(self) -> None:
        names = [uuid4().hex]
        dist.broadcast_object_list(names, src=0)
        self._key = f"flag/{names[0]}"
        # A connection of its own, because a thread raises the flag while another may wait in the store.
        self._store = dist.distributed_c10d._get_default_store().clone()

    def put_up(self) -> None:
        """From now on `is_up` on every rank."""
        self._store.set(self._key, "up")

    @property
    def is_up(self) -> bool:
        return self._store.check([self._key])


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
