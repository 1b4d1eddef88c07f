"""Where ranks meet that work for unequally long: whoever is still at work says so, and one that is silent ends the run.

A collective cannot tell a slow rank from one that hangs. Replicas generate for minutes or hours, the one with the
longest responses last; were the others to wait in a collective, its time-out would have to be as long, and a rank that
hangs anywhere would be noticed as late. So they wait at the store through which the process groups were made.
"""

import time
from datetime import timedelta
from itertools import count
from typing import Self

import torch.distributed as dist

SAYS_S = 5.0  # a rank at work says so at most this often
LONGEST_NAP_S = 0.5  # of a rank that waits, between two looks

_numbers = count()  # of the meetings that this process has made: each has keys of its own


class LostRank(RuntimeError):
    """Ranks that others wait for have said nothing for too long."""


class Meeting:
    """Every rank makes one, at the same time; `working()` while it works, `join()` when it is done, again and again.

    store: one that all ranks share; silence: a rank that neither works nor joins for so long is lost.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, silence: timedelta):
        self.rank, self.size, self.silence_s = rank, size, silence.total_seconds()
        # A connection of its own: a wait must not keep the process groups' threads from the store.
        self._store = dist.PrefixStore(f"meeting {next(_numbers)}", store.clone())
        self._number, self._words = 0, 0  # joined so far; how often this rank has said that it works
        self._said = time.monotonic()
        self._store.set(f"rank {rank}", "0")
        self._ranks = [f"rank {rank}" for rank in range(size)]
        self._store.wait(self._ranks, silence)

    @classmethod
    def of_all_ranks(cls, silence: timedelta) -> Self:
        """One for the ranks of the default process group."""
        store = dist.distributed_c10d._get_default_store()
        return cls(store, dist.get_rank(), dist.get_world_size(), silence)

    def working(self) -> None:
        """Say that this rank is at work; cheap enough for every pass of a model."""
        now = time.monotonic()
        if now - self._said >= min(SAYS_S, self.silence_s / 4):
            self._said, self._words = now, self._words + 1
            self._store.set(self._ranks[self.rank], str(self._words))

    def join(self) -> None:
        """Wait until every rank has joined; a LostRank where one is silent, on all that wait."""
        self._number += 1
        came, complete = f"joined {self._number}", f"complete {self._number}"
        self._store.set(self._ranks[self.rank], came)
        if self._store.add(f"count {self._number}", 1) == self.size:
            self._store.set(complete, "")
            for name in ("count", "complete"):  # everybody has left the one before
                self._store.delete_key(f"{name} {self._number - 1}")
        heard: dict[int, tuple[bytes, float]] = {}  # of each rank that is missing: its last word, and when it was new
        begun = listened = time.monotonic()
        while not self._store.check([complete]):
            now = time.monotonic()
            if now - listened >= self.silence_s / 4:
                listened = now
                self._listen(heard, came.encode())
            time.sleep(min(LONGEST_NAP_S, 0.002 + (now - begun) / 20))  # late by a twentieth of the wait at most

    def _listen(self, heard: dict[int, tuple[bytes, float]], came: bytes) -> None:
        now = time.monotonic()
        for rank, word in enumerate(self._store.multi_get(self._ranks)):
            if word == came:
                heard.pop(rank, None)
            elif rank not in heard or heard[rank][0] != word:
                heard[rank] = word, now
        silent = [str(rank) for rank, (_, since) in heard.items() if now - since >= self.silence_s]
        if silent:
            raise LostRank(
                f"rank {', '.join(silent)} said nothing for {self.silence_s:g} s while rank {self.rank} waited:"
                " hung, or in a pass that takes longer; the time-out is parallel.timeout_s"
            )
