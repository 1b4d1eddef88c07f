"""Which source each sample of a run comes from: exact at every prefix, and known for any index without replay.

Claim. After any number n of samples, source i has been drawn c_i(n) times with |c_i(n) - n * share_i| < 1, exactly
(integer arithmetic), and the source of sample n is found from n alone.

Construction. Write share_i = W_i / Q with integers, Q = sum of W. The bound says that draw j = 1, 2, ... of source i
lies in the slots R < t <= D with R = floor((j - 1) Q / W_i), D = ceil(j Q / W_i). Unit jobs with such windows, total
rate 1, fit on one machine, and earliest-deadline-first finds a schedule (a "pfair" schedule; Tijdeman's chairman
assignment is a kin). That is sequential, so time is cut into blocks of B slots whose borders get their counts from n
alone:

At a border n let f_i = n W_i / Q - floor(n W_i / Q). A source with f_i > 0 has one draw whose window straddles n; u =
sum of f_i of these straddlers must lie before n. They are picked by deadline, earliest first, skipping one where among
the m most recently released straddlers (for some m) more than ceil(their sum of f) would be picked.

Why the blocks can then be filled. By Hall's theorem for intervals it is enough to count, for b > n, the jobs that must
lie in (n, b]: b - n minus those whose window lies inside is an integer, and at least the sum of (1 - f_i) over
straddlers with deadline <= b, since source i's share of b - n splits into whole draws and the two fractions at the
ends. So up to the ceil of that sum of straddlers with deadline <= b may be left for after n. In the mirror image,
ceil(sum of f_i) of those released at or after a may lie before n. The fractions f_i themselves satisfy both families of
bounds; each family is a chain of sets, two chains make a totally unimodular matrix, hence a 0/1 choice satisfies both
too. The rule above is the greedy one for the second chain (a matroid), which picks most from every prefix of deadlines,
so it satisfies the first. B >= 1 / min share + 1, so that no window straddles two borders and the borders do not depend
on each other.

Where Q is small (weights as people write them) B is a multiple of Q, no window straddles a border, and all blocks are
the same one, computed once.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

_MIN_BLOCK = 1024  # slots; a block is scheduled in Python at about 1 us per slot
_MAX_PERIOD = 1 << 14
_MIN_SHARE = 1e-6  # a block has 1 / min share slots


class Mixture:
    """The source and the ordinal within that source of every sample, for the given weights (any positive scale).

    first, read: a mixture that follows another one begins at the run's sample `first`, with sources of which so many
    samples were taken before.
    """

    def __init__(self, weights: Sequence[float], first: int = 0, read: Sequence[int] | None = None):
        # The decimal a person wrote (0.15 is 15/100, not its binary neighbour): exact, and a short period.
        exact = [Fraction(repr(float(weight))) for weight in weights]
        total = sum(exact, Fraction(0))
        if total <= 0 or min(exact) < 0:
            raise ValueError(f"mixture weights must be >= 0 and not all 0, got {list(weights)}")
        shares = [weight / total for weight in exact]
        for number, share in enumerate(shares):
            if 0 < share < _MIN_SHARE:
                raise ValueError(
                    f"data.sources[{number}] has a share of {float(share):.1e}, below the smallest "
                    f"supported {_MIN_SHARE:.0e}"
                    "; raise its weight, or set it to 0 to leave it out"
                )
        self.shares, self.first = shares, first
        self.read = np.zeros(len(shares), np.int64) if read is None else np.array(read, np.int64)
        self.num_sources = len(shares)
        self._active = [number for number, share in enumerate(shares) if share > 0]
        self._period = math.lcm(*(share.denominator for share in shares))  # Q
        self._rates = [int(shares[number] * self._period) for number in self._active]  # W
        if self._period <= _MAX_PERIOD:
            self._block = self._period * -(-_MIN_BLOCK // self._period)
        else:
            self._block = max(_MIN_BLOCK, -(-self._period // min(self._rates)) + 1)
        self._border = lru_cache(maxsize=64)(self._border_counts)
        self._schedule = lru_cache(maxsize=64)(self._fill_block)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """samples int64 [n], indices in the run's global order -> (source ids int32 [n], ordinals in source int64
        [n]).
        """
        samples = np.asarray(samples, dtype=np.int64) - self.first
        sources = np.empty(len(samples), dtype=np.int32)
        ordinals = np.empty(len(samples), dtype=np.int64)
        blocks, slots = np.divmod(samples, self._block)
        for block in np.unique(blocks):
            chosen = blocks == block
            block_sources, block_ordinals, first = self._block_at(int(block))
            sources[chosen] = block_sources[slots[chosen]]
            ordinals[chosen] = block_ordinals[slots[chosen]] + first[sources[chosen]]
        return sources, ordinals + self.read[sources]

    def counts(self, num_samples: int) -> np.ndarray:
        """Draws of each source among the first `num_samples` samples of the run: int64 [sources]."""
        block, slot = divmod(num_samples - self.first, self._block)
        block_sources, _, first = self._block_at(block)
        return self.read + first + np.bincount(block_sources[:slot], minlength=self.num_sources)

    def _block_at(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source of each slot, its ordinal since the block's start, counts at the block's start)."""
        start, stop = self._border(block), self._border(block + 1)
        lags = tuple(
            block * self._block * rate - count * self._period for rate, count in zip(self._rates, start, strict=True)
        )
        draws = tuple(after - before for before, after in zip(start, stop, strict=True))
        sources, ordinals = self._schedule(lags, draws)
        first = np.zeros(self.num_sources, dtype=np.int64)
        first[self._active] = start
        return sources, ordinals, first

    def _border_counts(self, block: int) -> tuple[int, ...]:
        """Counts of the active sources after block * B samples."""
        floors, parts = zip(*(divmod(block * self._block * rate, self._period) for rate in self._rates), strict=True)
        straddlers = [i for i, part in enumerate(parts) if part]
        recent_first = sorted(straddlers, key=lambda i: -(-parts[i] // self._rates[i]))
        by_deadline = sorted(straddlers, key=lambda i: -(-(self._period - parts[i]) // self._rates[i]))
        room, total = [], 0  # room[m]: how many more of the m + 1 most recent may be picked
        for i in recent_first:
            total += parts[i]
            room.append(-(-total // self._period))
        place = {i: m for m, i in enumerate(recent_first)}
        wanted = total // self._period
        counts = list(floors)
        for i in by_deadline:
            if wanted and min(room[place[i] :]) > 0:
                counts[i] += 1
                wanted -= 1
                room[place[i] :] = [left - 1 for left in room[place[i] :]]
        assert wanted == 0, "mixture: a block border could not be balanced"
        return tuple(counts)

    def _fill_block(self, lags: tuple[int, ...], draws: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Earliest deadline first through one block.

        lags: n W_i - c_i Q at its start; draws: how often each active source must be drawn in it.
        """
        period, rates = self._period, self._rates
        lag, left, taken = list(lags), list(draws), [0] * len(draws)
        arrivals: list[list[int]] = [[] for _ in range(self._block + 2)]
        for i in range(len(draws)):
            if left[i]:
                # Slot t is in the window once c_i Q < (n + t) W_i, that is lag + t W_i > 0.
                arrivals[max(1, -lag[i] // rates[i] + 1)].append(i)
        ready: list[tuple[int, int]] = []
        sources = np.empty(self._block, dtype=np.int32)
        ordinals = np.empty(self._block, dtype=np.int64)
        for slot in range(1, self._block + 1):
            for i in arrivals[slot]:
                heapq.heappush(ready, (-(-(period - lag[i]) // rates[i]), i))
            deadline, i = heapq.heappop(ready)
            assert deadline >= slot, "mixture: a draw missed its deadline"
            sources[slot - 1], ordinals[slot - 1] = self._active[i], taken[i]
            taken[i] += 1
            left[i] -= 1
            lag[i] -= period
            if left[i]:
                arrivals[max(slot + 1, -lag[i] // rates[i] + 1)].append(i)
        return sources, ordinals
