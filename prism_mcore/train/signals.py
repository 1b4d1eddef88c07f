"""SIGTERM, SIGUSR1 and Ctrl-C ask the run to save and end; all ranks agree where."""

import signal
import socket
import threading
from types import FrameType
from typing import Self

from prism_mcore.agree import Flag

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Signals:
    """Catches the signals while the `with` block runs. Repeated ones change nothing: launchers often send several."""

    def __init__(self) -> None:
        self.received = False  # by this rank

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True


class SharedSignals(Signals):
    """The same, told to all ranks at once: `anywhere` can be asked in the middle of a step, by each rank alone.

    A thread tells them, because Python's own handlers wait until a collective that this rank is in has ended, perhaps
    for a replica that generates for an hour. Every rank enters the block together.
    """

    def __enter__(self) -> Self:
        self._flag = Flag()
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._tell, name="signals", daemon=True).start()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        signal.set_wakeup_fd(self._previous_wakeup)
        self._writing.close()  # the thread reads the end of it, and ends

    @property
    def anywhere(self) -> bool:
        """Has any rank been signalled?"""
        return self.received or self._flag.is_up

    def _tell(self) -> None:
        with self._reading:
            while numbers := self._reading.recv(64):
                if any(number in SIGNALS for number in numbers):
                    self._flag.put_up()
