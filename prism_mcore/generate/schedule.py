"""Which samples run in which slots and blocks: continuous batching as plain bookkeeping, the same on every rank.

Nothing here looks at a clock or at memory, so all tensor-parallel ranks decide alike. A sample starts only when the
blocks of its longest possible response can be set aside: what runs is never interrupted.
"""

# b running samples, t tokens of the prompts in one prefill pass, k samples that start, L blocks of the longest sample,
# n blocks asked for

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prism_mcore.generate.replica import BLOCK_LEN, SPARE, Capacity
from prism_mcore.generate.requests import Request


@dataclass(frozen=True)
class Admission:
    """Samples that start now, from prompts that are prefilled first or from the one that is held."""

    prompts: list[int]  # requests to prefill; none: the samples are the held prompt's
    prompt_slots: np.ndarray  # [prompts] int64: where each prompt's states go
    prompt_rows: np.ndarray  # [t] int64: where each token's key and value go
    slots: np.ndarray  # [k] int64: of the samples that start
    logits: np.ndarray  # [k] int64: which prompt of `prompts` each starts from; 0 for the held one
    slot_copies: tuple[np.ndarray, np.ndarray]  # (source, target) of the forked states
    block_copies: tuple[np.ndarray, np.ndarray]  # (source, target) of the forked last blocks of prompts


@dataclass(frozen=True)
class DecodeStep:
    """What one decoding pass is given, row by row; rows are in the order of their slots."""

    slots: np.ndarray  # [b] int64
    positions: np.ndarray  # [b] int64
    rows: np.ndarray  # [b] int64: where each row's key and value go
    block_table: np.ndarray  # [b, L] int32


@dataclass
class _Held:
    """A prefilled prompt with samples that wait for slots; its states are in a slot of its own."""

    request: int
    full: np.ndarray  # [n] int64: the blocks that the prompt fills, shared with its samples
    part: np.ndarray  # [0 or 1] int64: a copy of the block that it fills in part
    sample: int  # the next to start


def blocks_needed(prompt_lens: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Blocks of a sample at its longest; its last token is never cached."""
    return -(-(prompt_lens + limits - 1) // BLOCK_LEN)


class Blocks:
    """Which blocks are free, and how many sequences share each of the others.

    Blocks of one sequence are taken from the low end and those that a prompt's samples share from the high end: a
    decoding step then reads each of the two in long runs.
    """

    def __init__(self, count: int):
        self.owners = np.zeros(count, np.int32)

    @property
    def in_use(self) -> int:
        return int(np.count_nonzero(self.owners))

    def take(self, n: int, *, shared: bool = False) -> np.ndarray:
        """n free blocks [n] int64, owned once."""
        free = np.flatnonzero(self.owners == 0)
        assert len(free) >= n, f"{n} blocks wanted, {len(free)} of {len(self.owners)} free: they were set aside"
        taken = free[len(free) - n :][::-1] if shared else free[:n]
        self.owners[taken] = 1
        return taken

    def drop(self, blocks: np.ndarray) -> None:
        """One owner less for each; a block may be listed more than once."""
        np.subtract.at(self.owners, blocks, 1)


class Schedule:
    """The bookkeeping of one stream of requests.

    limits [requests]: the most tokens that a sample of each may have; prefill_tokens: of the prompts in one pass.
    """

    def __init__(self, requests: Sequence[Request], limits: np.ndarray, room: Capacity, prefill_tokens: int):
        self.requests, self.prefill_tokens = requests, prefill_tokens
        self.prompt_lens = np.array([len(request.tokens) for request in requests], np.int64)
        self.needs = blocks_needed(self.prompt_lens, limits)
        self.blocks = Blocks(room.blocks + SPARE)
        self.held_slot, self.scratch_slot = room.slots, room.slots + 1
        self.scratch_block = int(self.blocks.take(1, shared=True)[0])
        self.held: _Held | None = None
        self.next_request = 0
        self.active = np.zeros(room.slots, bool)
        self.request, self.sample, self.length, self.num_blocks, self.owed = np.zeros((5, room.slots), np.int64)
        self.block_table = np.zeros((room.slots, int(self.needs.max(initial=1))), np.int32)

    @property
    def unfinished(self) -> bool:
        return bool(self.active.any()) or self.held is not None or self.next_request < len(self.requests)

    def admit(self) -> Admission | None:
        """The next samples that can start, None where there are none, or no room."""
        return self._admit_prompts() if self.held is None else self._admit_held(self.held)

    def decode(self) -> DecodeStep:
        """One more token for every running sample; a new block for those whose last one is full."""
        slots = np.flatnonzero(self.active)
        positions = self.length[slots]
        full = slots[positions % BLOCK_LEN == 0]
        if len(full):
            self.block_table[full, self.num_blocks[full]] = self.blocks.take(len(full))
            self.num_blocks[full] += 1
            self.owed[full] -= 1
        number = positions // BLOCK_LEN
        rows = self.block_table[slots, number].astype(np.int64) * BLOCK_LEN + positions % BLOCK_LEN
        self.length[slots] += 1
        return DecodeStep(slots, positions, rows, self.block_table[slots, : number.max() + 1])

    def finish(self, slots: np.ndarray) -> None:
        """Samples that are done: their slots and blocks are free."""
        for slot in slots.tolist():
            self.blocks.drop(self.block_table[slot, : self.num_blocks[slot]])
        self.active[slots] = False
        self.owed[slots] = 0

    def _admit_held(self, held: _Held) -> Admission | None:
        waiting = len(self.requests[held.request].keys) - held.sample
        slots = self._free_slots()[:waiting]
        own = self._own_blocks(held.request)
        slots = slots[: self._free_blocks() // own] if own else slots
        if not len(slots):
            return None
        part = self._start(held.request, held.sample, slots, held.full)
        held.sample += len(slots)
        if held.sample == len(self.requests[held.request].keys):
            self.blocks.drop(np.concatenate([held.full, held.part]))
            self.held = None
        return Admission(
            prompts=[],
            prompt_slots=np.empty(0, np.int64),
            prompt_rows=np.empty(0, np.int64),
            slots=slots,
            logits=np.zeros(len(slots), np.int64),
            slot_copies=(np.full(len(slots), self.held_slot), slots),
            block_copies=(np.repeat(held.part, len(part)), part),
        )

    def _admit_prompts(self) -> Admission | None:
        prompts: list[int] = []
        rows, starts, logits, slot_copies, block_copies = [], [], [], [], []
        tokens, free = 0, self._free_slots()
        while self.next_request < len(self.requests) and self.held is None:
            request = self.next_request
            length, samples = int(self.prompt_lens[request]), len(self.requests[request].keys)
            count = self._startable(request, len(free))
            if not count or (prompts and tokens + length > self.prefill_tokens):
                break
            slots, free = free[:count], free[count:]
            full = self.blocks.take(length // BLOCK_LEN, shared=samples > 1)
            part = self._start(request, 0, slots, full)
            own = np.concatenate([full, part[:1]])
            rows.append((own[:, None] * BLOCK_LEN + np.arange(BLOCK_LEN)).flatten()[:length])
            copies, targets = part[1:], slots[1:]
            if count < samples:
                kept = self.blocks.take(len(part[:1]))
                self.held = _Held(request, full, kept, count)
                copies, targets = np.concatenate([copies, kept]), np.append(targets, self.held_slot)
            else:
                self.blocks.drop(full)  # its samples own them now
            prompts.append(request)
            starts.append(slots)
            logits.append(np.full(count, len(prompts) - 1))
            slot_copies.append((np.full(len(targets), slots[0]), targets))
            block_copies.append((np.repeat(part[:1], len(copies)), copies))
            self.next_request, tokens = request + 1, tokens + length
        if not prompts:
            return None
        return Admission(
            prompts=prompts,
            prompt_slots=np.array([slots[0] for slots in starts]),
            prompt_rows=np.concatenate(rows),
            slots=np.concatenate(starts),
            logits=np.concatenate(logits),
            slot_copies=_joined(slot_copies),
            block_copies=_joined(block_copies),
        )

    def _start(self, request: int, sample: int, slots: np.ndarray, full: np.ndarray) -> np.ndarray:
        """Put samples from `sample` on into slots [k]: [k] or [0] blocks, theirs, for the prompt's last tokens."""
        length = int(self.prompt_lens[request])
        part = self.blocks.take(len(slots) if length % BLOCK_LEN else 0)
        self.block_table[slots, : len(full)] = full
        self.blocks.owners[full] += len(slots)
        if len(part):
            self.block_table[slots, len(full)] = part
        self.num_blocks[slots] = -(-length // BLOCK_LEN)
        self.owed[slots] = self._own_blocks(request) - bool(len(part))
        self.request[slots], self.length[slots], self.active[slots] = request, length, True
        self.sample[slots] = np.arange(sample, sample + len(slots))
        return part

    def _startable(self, request: int, slots: int) -> int:
        """How many samples of a request that is not prefilled yet have room."""
        length, samples = int(self.prompt_lens[request]), len(self.requests[request].keys)
        own, free = self._own_blocks(request), self._free_blocks() - length // BLOCK_LEN
        count = min(samples, slots, free // own if own else slots) if free >= 0 else 0
        keeps = count < samples and length % BLOCK_LEN > 0  # a copy of the last block for those that wait
        return max(0, min(count, (free - keeps) // own if own else count))

    def _free_slots(self) -> np.ndarray:
        return np.flatnonzero(~self.active)

    def _free_blocks(self) -> int:
        """Blocks that no sample has or was promised."""
        return len(self.blocks.owners) - self.blocks.in_use - int(self.owed.sum())

    def _own_blocks(self, request: int) -> int:
        """Blocks of a sample at its longest, beside those that its prompt fills."""
        return int(self.needs[request] - self.prompt_lens[request] // BLOCK_LEN)


def _joined(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs])
