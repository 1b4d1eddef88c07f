"""SIGTERM, SIGUSR1 and Ctrl-C ask the run to finish its step, save and end; all ranks agree on the step."""

import signal
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Signals:
    """Catches the signals while the `with` block runs. Repeated ones change nothing: launchers often send several."""

    def __init__(self) -> None:
        self._received = False
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def received(self) -> bool:
        """Has any rank been signalled? One small reduction; every rank calls it after every step."""
        flag = torch.tensor(int(self._received), device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
