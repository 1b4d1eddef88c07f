"""SIGTERM, SIGUSR1 and Ctrl-C ask the run to finish its step, save and end; all ranks agree on the step."""

import signal
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Signals:
    """Catches the signals while the `with` block runs. Repeated ones change nothing: launchers often send several."""

    def __init__(self) -> None:
        self._received = False

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    @property
    def received(self) -> bool:
        """Has this rank been signalled?"""
        return self._received
