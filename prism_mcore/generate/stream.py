"""One stream of requests through a replica: prefill, fork, decode, sample, until every sample is done."""

# b running samples, t tokens of a pass, n rows of logits, v vocabulary (local), d hidden

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from prism_kernels.boundaries import Boundaries
from prism_mcore.generate.graphs import DecodeGraphs, capturable
from prism_mcore.generate.replica import Replica
from prism_mcore.generate.requests import Completion, Request
from prism_mcore.generate.sampler import uniforms
from prism_mcore.generate.schedule import Admission, Schedule, blocks_needed
from prism_mcore.generate.settings import Sampling
from prism_mcore.model.state import Decode, PackedTokens, Prefill
from prism_mcore.text import StopTexts

AHEAD = 64  # uniform numbers drawn at a time for each sample


class Stream:
    """The requests' schedule and, for every slot, what its sample has produced so far.

    ends: tokens that end a response; stop_texts: texts that do; context: most tokens of prompt and response together;
    budget: most tokens of a sample in this stream, or 0.
    """

    def __init__(
        self,
        replica: Replica,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        ends: Collection[int],
        stop_texts: StopTexts | None,
        context: int,
        budget: int = 0,
        before_pass: Callable[[], None] = lambda: None,
    ):
        self.before_pass = before_pass
        self.replica, self.model, self.requests, self.sampling = replica, replica.model, requests, sampling
        self.temperature = sampling.temperature or 1.0
        self.sampler = replica.sampler(sampling)
        lengths = np.array([len(request.tokens) for request in requests], np.int64)
        samples = np.array([len(request.keys) for request in requests], np.int64)
        self.begun = np.array([request.begun for request in requests], np.int64)
        self.limits = np.minimum(sampling.max_tokens, context - (lengths - self.begun))
        self.ends = np.minimum(self.limits, self.begun + budget) if budget else self.limits
        needs = np.repeat(blocks_needed(lengths, self.ends - self.begun), samples)
        room = replica.capacity(needs)
        self.caches = replica.caches(room)
        self.schedule = Schedule(requests, self.ends - self.begun, room, replica.settings.prefill_tokens)
        self.held_logits: Tensor | None = None
        self.graphs: DecodeGraphs | None = None
        if capturable(self.model.context.ops, self.model.context.spec.head_dim, replica.device):
            width, slot, block = (
                self.schedule.block_table.shape[1],
                self.schedule.scratch_slot,
                self.schedule.scratch_block,
            )
            self.graphs = DecodeGraphs(width, slot, block, replica.device)

        self.keys = np.array([key for request in requests for key in request.keys], np.uint64)
        self.first_key = np.cumsum(samples) - samples
        self.is_stop = np.zeros(self.model.spec.vocab_size, bool)
        self.is_stop[[token for token in ends if token < len(self.is_stop)]] = True
        self.stop_texts = stop_texts

        longest = int(self.ends.max())
        self.uniform = np.zeros((room.slots, AHEAD))
        self.drawn = np.zeros(room.slots, np.int64)  # the position of the first of them
        self.count = np.zeros(room.slots, np.int64)  # tokens of the response, those begun with included
        self.tokens = np.zeros((room.slots, longest), np.int32)
        self.logprobs = np.zeros((room.slots, longest), np.float32)

    def completions(self) -> Iterator[Completion]:
        """Finished slots are filled again before the next decoding pass."""
        while self.schedule.unfinished:
            self.before_pass()
            while (admission := self.schedule.admit()) is not None:
                self.before_pass()
                yield from self._start(admission)
            if self.schedule.unfinished:
                assert self.schedule.active.any(), "the caches have room for any sample that runs alone"
                yield from self._decode()

    def _start(self, admission: Admission) -> Iterator[Completion]:
        logits = self._prefill(admission) if admission.prompts else self.held_logits
        assert logits is not None, "a held prompt was prefilled before"
        if self.schedule.held is not None and admission.prompts:
            self.held_logits = logits[-1:].clone()
        self.caches.copy_slots(*map(self._tensor, admission.slot_copies))
        self.caches.copy_blocks(*map(self._tensor, admission.block_copies))
        self._begin(admission.slots)
        return self._sample(admission.slots, logits[self._tensor(admission.logits)])

    def _prefill(self, admission: Admission) -> Tensor:
        """Logits [prompts, v] after each prompt, whose keys, values and states are then cached."""
        prompts = [self.requests[i].tokens for i in admission.prompts]
        ends = torch.tensor(list(accumulate(map(len, prompts), initial=0)), dtype=torch.int32)
        tokens = self._tensor(np.concatenate([np.array(prompt, np.int64) for prompt in prompts]))
        positions = self._tensor(np.concatenate([np.arange(len(prompt)) for prompt in prompts]))
        boundaries = Boundaries.on(self.replica.device, ends)
        seq = PackedTokens(boundaries, max(map(len, prompts)), self.model.rope(positions))
        step = Prefill(self._tensor(admission.prompt_slots), self._tensor(admission.prompt_rows))
        self.replica.count(prefilled_tokens=len(tokens))
        with self.model.whole_sequences():
            hidden = self.model.advance(tokens, seq, step, self.caches.layers)
            last = hidden[self._tensor(ends[1:].numpy().astype(np.int64) - 1)]
            return self.model.next_logits(last, self.temperature)

    def _decode(self) -> Iterator[Completion]:
        step = self.schedule.decode()
        slots, b = step.slots, len(step.slots)
        newest = self.tokens[slots, self.count[slots] - 1]
        rows = self._tensor(np.stack([newest, slots, step.positions, step.rows]))
        table = self._tensor(step.block_table)
        self.replica.count(steps=1, running_steps=b, slot_steps=len(self.schedule.active))
        logits = self._forward(rows, table) if self.graphs is None else self.graphs(self._forward, rows, table)
        return self._sample(slots, logits)

    def _forward(self, rows: Tensor, table: Tensor) -> Tensor:
        """One more token for b samples: (token, slot, position, row of the cache) [4, b], blocks [b, L] -> [b, v]."""
        tokens, slots, positions, places = rows
        each = Boundaries(torch.arange(len(tokens) + 1, dtype=torch.int32))
        step = Decode(slots, positions, places, table, (positions + 1).to(torch.int32))
        with self.model.whole_sequences():
            hidden = self.model.advance(
                tokens, PackedTokens(each, 1, self.model.rope(positions)), step, self.caches.layers
            )
            return self.model.next_logits(hidden, self.temperature)

    def _sample(self, slots: np.ndarray, logits: Tensor) -> Iterator[Completion]:
        """One more token for each of these slots; those that are done leave."""
        count = self.count[slots]
        drawn, drawn_logprobs = self.sampler(logits, self._tensor(self._uniforms(slots)))
        tokens, logprobs = drawn.cpu().numpy(), drawn_logprobs.cpu().numpy()
        if not np.isfinite(logprobs).all():
            raise FloatingPointError("the model's logits are not finite: its weights hold NaN or Inf, or lead to them")
        self.tokens[slots, count], self.logprobs[slots, count] = tokens, logprobs
        self.count[slots] += 1
        self.replica.count(decoded_tokens=len(slots))
        stopped = self.is_stop[tokens]
        done = stopped | (count + 1 >= self.ends[self.schedule.request[slots]])
        if self.stop_texts is not None:
            for i in np.flatnonzero(~stopped):
                done[i] |= self._reached_text(slots[i])
        if not done.any():
            return iter(())
        finished = [self._completion(slot, bool(stop)) for slot, stop in zip(slots[done], stopped[done], strict=True)]
        self.schedule.finish(slots[done])
        return iter(finished)

    def _begin(self, slots: np.ndarray) -> None:
        """Of samples that start: what they begin with, and no uniform numbers yet."""
        self.count[slots] = begun = self.begun[self.schedule.request[slots]]
        self.drawn[slots] = -AHEAD
        for slot, count in zip(slots[begun > 0], begun[begun > 0], strict=True):
            self.tokens[slot, :count] = self.requests[self.schedule.request[slot]].tokens[-count:]

    def _uniforms(self, slots: np.ndarray) -> np.ndarray:
        place = self.count[slots] - self.drawn[slots]
        fresh = slots[place >= AHEAD]
        if len(fresh) and not self.sampler.greedy:
            keys = self.keys[self.first_key[self.schedule.request[fresh]] + self.schedule.sample[fresh]]
            self.drawn[fresh] = self.count[fresh]
            positions = self.count[fresh][:, None] + np.arange(AHEAD)
            drawn = uniforms(keys.repeat(AHEAD, 0), positions.flatten())
            self.uniform[fresh] = drawn.reshape(len(fresh), AHEAD)
            place = self.count[slots] - self.drawn[slots]
        return self.uniform[slots, place % AHEAD]

    def _reached_text(self, slot: int) -> bool:
        assert self.stop_texts is not None
        end = int(self.count[slot])
        if not self.stop_texts.reached(self.tokens[slot, max(0, end - self.stop_texts.window) : end].tolist()):
            return False
        if self.sampling.stop_in_think:
            return True
        request = self.requests[self.schedule.request[slot]]
        prompt = request.tokens[: len(request.tokens) - request.begun]
        return self.stop_texts.reached_after_think(prompt, self.tokens[slot, :end].tolist())

    def _completion(self, slot: int, stopped: bool) -> Completion:
        count, request = int(self.count[slot]), int(self.schedule.request[slot])
        text = not stopped and self.stop_texts is not None and self._reached_text(slot)
        full = "length" if count == self.sampling.max_tokens else "context"
        if count < self.limits[request]:
            full = "budget"
        new = slice(int(self.begun[request]), count)
        return Completion(
            request=request,
            sample=int(self.schedule.sample[slot]),
            tokens=tuple(self.tokens[slot, new].tolist()),
            logprobs=self.logprobs[slot, new].copy(),
            finish="stop" if stopped or text else full,
            stop_token=stopped,
        )

    def _tensor(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.replica.device)
