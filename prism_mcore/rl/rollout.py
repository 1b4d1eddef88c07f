"""Prompts to verified rollouts: generated on this replica's weights, verified as each finishes, known to every rank."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from prism_mcore.batch import Prompt, Rollout, RolloutGroup
from prism_mcore.generate.engine import Engine
from prism_mcore.generate.requests import Completion, Key, Request
from prism_mcore.generate.settings import Sampling
from prism_mcore.meeting import Meeting
from prism_mcore.parallel import Groups
from prism_mcore.rewards.settings import RewardSettings
from prism_mcore.rewards.verifier import Verdict, Verifier, reward_parts
from prism_mcore.text import Tokenizer, before_stop
from prism_mcore.train.guards import GuardStop
from prism_mcore.train.metrics import StepClock

STOP_EVERY = 8  # passes between two questions whether the run is to end


class Interrupted(Exception):
    """A rank was asked to end the run while rollouts were generated; raised on every rank."""


@dataclass
class RolloutWorker:
    """Makes rollouts with one replica's engine; every rank has one, and the first of each replica verifies.

    Prompts go to replicas by index. The uniform numbers of a sample come from its key (seed, step, prompt, sample) and
    the position, so rollouts do not depend on the layout, on batching or on restarts.
    """

    engine: Engine
    stop: Sequence[str]  # sampling.stop
    verifier: Verifier | None  # None on ranks that do not verify
    tokenizer: Tokenizer
    rewards: RewardSettings
    seed: int
    groups: Groups
    meeting: Meeting  # of replicas after generation, which takes them unequally long
    clock: StepClock = field(default_factory=StepClock)
    stopping: Callable[[], bool] = lambda: False  # is the run to end?
    passes: int = 0  # through the model in this call
    tickets: int = 0  # given out so far
    idle_share: float = 0.0  # of the engine's slots in the last call
    generation_s: float = 0.0  # of the slowest replica since the clock was started

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, step: int, version: int) -> list[RolloutGroup]:
        """A group of sampling.samples rollouts for each prompt, in their order, the same on every rank.

        version: optimizer updates that the weights have seen. Marks the clock: generation, rewards, gather. Raises
        Interrupted within a few passes once `stopping`, and GuardStop where a replica's numbers are not finite.
        """
        keys = self._keys(prompts, sampling.samples, step)
        mine = list(enumerate(prompts))[self.groups.dp_rank :: self.groups.dp_size]
        rollouts: list[Rollout] = []
        failure, interrupted = "", False
        try:
            finished = self._sampled(mine, keys, sampling)
            self.clock.mark("generation")
            rollouts = self._verified(finished, mine, keys, sampling, version)
            self.clock.mark("rewards")
        except FloatingPointError as error:  # perhaps of this replica alone: the others hear of it where they meet
            failure = f"rank {self.groups.rank}: {error}"
        except Interrupted:
            interrupted = True
        ordered = sorted(self._gathered(rollouts, failure, interrupted, step), key=lambda r: (r.group, r.sample))
        by_group = {group: tuple(members) for group, members in groupby(ordered, key=lambda r: r.group)}
        return [RolloutGroup(prompt, by_group[place]) for place, prompt in enumerate(prompts)]

    def _sampled(
        self, mine: Sequence[tuple[int, Prompt]], keys: Sequence[tuple[Key, ...]], sampling: Sampling
    ) -> list[tuple[int, str, Completion]]:
        """(ticket, text, completion) of this replica's samples; each is being verified since it was finished."""
        before = self.engine.statistics
        requests = [Request(prompt.tokens, keys[place]) for place, prompt in mine]
        finished: list[tuple[int, str, Completion]] = []
        self.passes = 0
        for completion in self.engine.stream(requests, sampling, self._before_pass):
            if self.verifier is not None:
                text = self.text(completion.tokens, completion.stop_token)
                finished.append((self.tickets, text, completion))
                self.verifier.submit(self.tickets, mine[completion.request][1].record, text)
                self.tickets += 1
        after = self.engine.statistics
        slots, running = after.slot_steps - before.slot_steps, after.running_steps - before.running_steps
        self.idle_share = 1 - running / slots if slots else 0.0
        return finished

    def _verified(
        self,
        finished: Sequence[tuple[int, str, Completion]],
        mine: Sequence[tuple[int, Prompt]],
        keys: Sequence[tuple[Key, ...]],
        sampling: Sampling,
        version: int,
    ) -> list[Rollout]:
        verified = self.verifier.results(block=True, on_wait=self._while_verifying) if self.verifier else []
        verdicts = {verdict.ticket: verdict for verdict in verified}
        return [
            self._rollout(*mine[completion.request], keys, completion, verdicts[ticket], text, sampling, version)
            for ticket, text, completion in finished
        ]

    def _while_verifying(self) -> None:
        """Verdicts may take as long as rewards.timeout_s: the run can end here, too."""
        self.meeting.working()
        if self.stopping():
            raise Interrupted

    def _before_pass(self) -> None:
        """Is the run to end? The ranks of a replica leave it together, the replicas each for itself."""
        self.meeting.working()
        self.passes += 1
        if self.passes % STOP_EVERY == 1:
            stopping = self.stopping()
            if self.groups.tp_size > 1:
                flag = torch.tensor(int(stopping), device=self.engine.replica.device)
                dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.groups.tp)
                stopping = bool(flag)
            if stopping:
                raise Interrupted

    def _gathered(self, rollouts: list[Rollout], failure: str, interrupted: bool, step: int) -> list[Rollout]:
        """Every replica's rollouts, where all have made them. Marks the clock: gather."""
        self.meeting.join()
        everyone: list[Any] = [None] * self.groups.tp_dp_cp.size()
        here = rollouts, self.clock.parts.get("time/generation_s", 0.0), failure, interrupted
        dist.all_gather_object(everyone, here, group=self.groups.tp_dp_cp)
        if failures := [failure for _, _, failure, _ in everyone if failure]:
            raise GuardStop(f"step {step}: {'; '.join(failures)}")
        if any(interrupted for *_, interrupted in everyone):
            raise Interrupted
        self.generation_s = max(seconds for _, seconds, *_ in everyone)
        self.clock.mark("gather")
        return [rollout for of_rank, *_ in everyone for rollout in of_rank]

    def text(self, tokens: Sequence[int], stop_token: bool) -> str:
        """A response as people and rewards read it, special tokens included, without the token or text that ends it."""
        text = self.tokenizer.decode(tokens[:-1] if stop_token else tokens, special=True)
        return before_stop(text, self.stop)

    def _keys(self, prompts: Sequence[Prompt], samples: int, step: int) -> list[tuple[Key, ...]]:
        """Of each prompt's samples; a prompt that is asked again in the step goes on counting: they are to differ."""
        asked: Counter[int] = Counter()
        keys: list[tuple[Key, ...]] = []
        for prompt in prompts:
            first = asked[prompt.index]
            keys.append(tuple((self.seed, step, prompt.index, first + sample) for sample in range(samples)))
            asked[prompt.index] += samples
        return keys

    def _rollout(
        self,
        group: int,
        prompt: Prompt,
        keys: Sequence[tuple[Key, ...]],
        completion: Completion,
        verdict: Verdict,
        text: str,
        sampling: Sampling,
        version: int,
    ) -> Rollout:
        tokens, stop_token = completion.tokens, completion.stop_token
        parts = {}
        if verdict.status == "ok":
            parts = reward_parts(verdict, text, tokens, stop_token, self.rewards)
        return Rollout(
            prompt=prompt.index,
            group=group,
            sample=completion.sample,
            key=keys[group][completion.sample],
            prompt_tokens=prompt.tokens,
            tokens=tokens,
            logprobs=completion.logprobs,
            versions=np.full(len(tokens), version, np.int32),
            temperature=sampling.temperature,
            finish=completion.finish,
            stop_token=stop_token,
            verifier=verdict.status,
            rewards=parts,
            valid=verdict.status == "ok",
        )
