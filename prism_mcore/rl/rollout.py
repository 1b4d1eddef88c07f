"""Prompts to verified rollouts: generated on this replica's weights, verified as each finishes, known to every rank."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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


UNFINISHED = "budget"  # the finish of a rollout that is to be continued


class Interrupted(Exception):
    """A rank was asked to end the run while rollouts were generated; raised on every rank."""


@dataclass(frozen=True)
class Task:
    """What one request of the engine is for: all samples of a new prompt, or the rest of a rollout that was begun."""

    group: int  # its place in the step
    prompt: Prompt
    keys: tuple[Key, ...]
    begun: Rollout | None = None

    @property
    def request(self) -> Request:
        if self.begun is None:
            return Request(self.prompt.tokens, self.keys)
        return Request(self.prompt.tokens + self.begun.tokens, self.keys, begun=len(self.begun.tokens))


@dataclass
class RolloutWorker:
    """Makes rollouts with one replica's engine; every rank has one, and the first of each replica verifies.

    Requests are dealt to replicas by their number of samples. The uniform numbers of a sample come from its key (seed,
    step, prompt, sample) and the position, so rollouts do not depend on the layout, on batching or on restarts.
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
    generated: int = 0  # tokens of all replicas in the last call
    generation_s: float = 0.0  # of the slowest replica since the clock was started

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        step: int,
        version: int,
        unfinished: Sequence[RolloutGroup] = (),
        budget: int = 0,
        first_sample: int = 0,
    ) -> list[RolloutGroup]:
        """The unfinished groups, continued, and a group of sampling.samples rollouts for each prompt, on every rank.

        version: optimizer updates that the weights have seen. first_sample: where another call of the step has samples,
        how many of each prompt, so that these differ. budget: tokens that a rollout may gain, or 0; one that is
        not done then has the finish "budget", and is not verified. Marks the clock: generation, rewards, gather. Raises
        Interrupted within a few passes once `stopping`, and GuardStop where a replica's numbers are not finite.
        """
        tasks = self._tasks(prompts, unfinished, self._keys(prompts, sampling.samples, step, first_sample))
        mine = dealt([len(task.keys) for task in tasks], self.groups.dp_size)[self.groups.dp_rank]
        rollouts: list[Rollout] = []
        failure, interrupted = "", False
        try:
            sampled = self._sampled([tasks[i] for i in mine], sampling, version, budget)
            self.clock.mark("generation")
            rollouts = self._verified(sampled)
            self.clock.mark("rewards")
        except FloatingPointError as error:  # perhaps of this replica alone: the others hear of it where they meet
            failure = f"rank {self.groups.rank}: {error}"
        except Interrupted:
            interrupted = True
        done = [
            replace(r, group=i) for i, group in enumerate(unfinished) for r in group.rollouts if r.finish != UNFINISHED
        ]
        ordered = sorted(
            [*done, *self._gathered(rollouts, version, failure, interrupted, step)], key=lambda r: (r.group, r.sample)
        )
        by_group = {group: tuple(members) for group, members in groupby(ordered, key=lambda r: r.group)}
        every = [*(group.prompt for group in unfinished), *prompts]
        return [RolloutGroup(prompt, by_group[place]) for place, prompt in enumerate(every)]

    def _tasks(
        self, prompts: Sequence[Prompt], unfinished: Sequence[RolloutGroup], keys: Sequence[tuple[Key, ...]]
    ) -> list[Task]:
        """Those that were begun first, the longest before the others: they are likely to take longest."""
        begun = [
            Task(place, group.prompt, (rollout.key,), rollout)
            for place, group in enumerate(unfinished)
            for rollout in group.rollouts
            if rollout.finish == UNFINISHED
        ]
        begun.sort(key=lambda task: -len(task.begun.tokens) if task.begun else 0)
        new = enumerate(zip(prompts, keys, strict=True), len(unfinished))
        return begun + [Task(place, prompt, of_prompt) for place, (prompt, of_prompt) in new]

    def _sampled(
        self, tasks: Sequence[Task], sampling: Sampling, version: int, budget: int
    ) -> list[tuple[int, str, Rollout]]:
        """(ticket, text, rollout) of this replica's samples; each is being verified since it was finished.

        Ticket -1 is of one that is unfinished.
        """
        before = self.engine.statistics
        sampled: list[tuple[int, str, Rollout]] = []
        self.passes = 0
        for completion in self.engine.stream([task.request for task in tasks], sampling, self._before_pass, budget):
            if self.verifier is None:
                continue
            task = tasks[completion.request]
            rollout = _rollout(task, completion, version, sampling.temperature)
            if rollout.finish == UNFINISHED:
                sampled.append((-1, "", rollout))
                continue
            text = self.text(rollout.tokens, rollout.stop_token)
            sampled.append((self.tickets, text, rollout))
            self.verifier.submit(self.tickets, task.prompt.record, text)
            self.tickets += 1
        after = self.engine.statistics
        slots, running = after.slot_steps - before.slot_steps, after.running_steps - before.running_steps
        self.idle_share = 1 - running / slots if slots else 0.0
        return sampled

    def _verified(self, sampled: Sequence[tuple[int, str, Rollout]]) -> list[Rollout]:
        verified = self.verifier.results(block=True, on_wait=self._while_verifying) if self.verifier else []
        verdicts = {verdict.ticket: verdict for verdict in verified}
        return [
            rollout if rollout.finish == UNFINISHED else self._rewarded(rollout, verdicts[ticket], text)
            for ticket, text, rollout in sampled
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

    def _gathered(
        self, rollouts: list[Rollout], version: int, failure: str, interrupted: bool, step: int
    ) -> list[Rollout]:
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
        every = [rollout for of_rank, *_ in everyone for rollout in of_rank]
        self.generated = sum(int(np.count_nonzero(rollout.versions == version)) for rollout in every)
        self.clock.mark("gather")
        return every

    def text(self, tokens: Sequence[int], stop_token: bool) -> str:
        """A response as people and rewards read it, special tokens included, without the token or text that ends it."""
        text = self.tokenizer.decode(tokens[:-1] if stop_token else tokens, special=True)
        return before_stop(text, self.stop)

    def _keys(self, prompts: Sequence[Prompt], samples: int, step: int, first_sample: int) -> list[tuple[Key, ...]]:
        """Of each prompt's samples; a prompt that is asked again in the step goes on counting: they are to differ."""
        asked: Counter[int] = Counter()
        keys: list[tuple[Key, ...]] = []
        for prompt in prompts:
            first = first_sample + asked[prompt.index]
            keys.append(tuple((self.seed, step, prompt.index, first + sample) for sample in range(samples)))
            asked[prompt.index] += samples
        return keys

    def _rewarded(self, rollout: Rollout, verdict: Verdict, text: str) -> Rollout:
        good, parts = verdict.status == "ok", {}
        if good:
            parts = reward_parts(verdict, text, rollout.tokens, rollout.stop_token, self.rewards)
        return replace(rollout, verifier=verdict.status, rewards=parts, valid=good)


def numbered(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """The groups with their places among each other in their rollouts."""
    return [
        replace(group, rollouts=tuple(replace(rollout, group=place) for rollout in group.rollouts))
        for place, group in enumerate(groups)
    ]


def dealt(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Places in `costs` by rank: each, in order, to the rank with the least so far, of equals the lowest."""
    totals: list[int] = [0] * ranks
    places: list[list[int]] = [[] for _ in range(ranks)]
    for place, cost in enumerate(costs):
        rank = totals.index(min(totals))
        places[rank].append(place)
        totals[rank] += cost
    return places


def _rollout(task: Task, completion: Completion, version: int, temperature: float) -> Rollout:
    """A rollout as it is sampled, not verified yet; one that was begun with all of its tokens."""
    sample, tokens, logprobs = completion.sample, completion.tokens, completion.logprobs
    versions = np.full(len(tokens), version, np.int32)
    if (begun := task.begun) is not None:
        sample, tokens = begun.sample, begun.tokens + tokens
        logprobs = np.concatenate([begun.logprobs, logprobs])
        versions = np.concatenate([begun.versions, versions])
    return Rollout(
        prompt=task.prompt.index,
        group=task.group,
        sample=sample,
        key=task.keys[completion.sample],
        prompt_tokens=task.prompt.tokens,
        tokens=tokens,
        logprobs=logprobs,
        versions=versions,
        temperature=temperature,
        finish=completion.finish,
        stop_token=completion.stop_token,
        valid=False,
    )
