"""Prompts to verified rollouts: generated on this replica's weights, verified as each finishes, known to every rank."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch.distributed as dist

from prism_mcore.batch import Prompt, Rollout, RolloutGroup
from prism_mcore.generate.engine import Engine
from prism_mcore.generate.requests import Completion, Request
from prism_mcore.generate.settings import Sampling
from prism_mcore.parallel import Groups
from prism_mcore.rl.rewards.settings import RewardSettings
from prism_mcore.rl.rewards.verifier import Verdict, Verifier, reward_parts
from prism_mcore.train.metrics import StepClock


@dataclass
class Roller:
    """Makes rollouts with one replica's engine; every rank has one, and the first of each replica verifies.

    Prompts go to replicas by index. The uniform numbers of a sample come from its key (seed, step, prompt, sample) and
    the position, so rollouts do not depend on the layout, on batching or on restarts.
    """

    engine: Engine
    stop: Sequence[str]  # sampling.stop
    verifier: Verifier | None  # None on ranks that do not verify
    tokenizer: Any
    rewards: RewardSettings
    seed: int
    groups: Groups
    clock: StepClock = field(default_factory=StepClock)
    tickets: int = 0  # given out so far
    idle_share: float = 0.0  # of the engine's slots in the last roll

    def roll(self, prompts: Sequence[Prompt], sampling: Sampling, *, step: int, version: int) -> list[RolloutGroup]:
        """A group of sampling.samples rollouts for each prompt, in their order, the same on every rank.

        version: optimizer updates that the weights have seen. Marks the clock: generation, rewards, gather.
        """
        mine = list(enumerate(prompts))[self.groups.dp_rank :: self.groups.dp_size]
        keys = [
            tuple((self.seed, step, prompt.index, sample) for sample in range(sampling.samples)) for _, prompt in mine
        ]
        before = self.engine.statistics
        requests = [Request(prompt.tokens, of_prompt) for (_, prompt), of_prompt in zip(mine, keys, strict=True)]
        finished: list[tuple[int, str, Completion]] = []
        for completion in self.engine.stream(requests, sampling):
            if self.verifier is not None:
                text = self.text(completion.tokens, completion.stop_token)
                finished.append((self.tickets, text, completion))
                self.verifier.submit(self.tickets, mine[completion.request][1].record, text)
                self.tickets += 1
        after = self.engine.statistics
        slots, running = after.slot_steps - before.slot_steps, after.running_steps - before.running_steps
        self.idle_share = 1 - running / slots if slots else 0.0
        self.clock.mark("generation")
        verdicts = {verdict.ticket: verdict for verdict in self.verifier.results(block=True)} if self.verifier else {}
        rollouts = [
            self._rollout(*mine[completion.request], completion, verdicts[ticket], text, sampling, step, version)
            for ticket, text, completion in finished
        ]
        self.clock.mark("rewards")
        everyone: list[list[Rollout]] = [[] for _ in range(self.groups.tp_dp_cp.size())]
        dist.all_gather_object(everyone, rollouts, group=self.groups.tp_dp_cp)
        self.clock.mark("gather")
        ordered = sorted((r for of_rank in everyone for r in of_rank), key=lambda r: (r.group, r.sample))
        by_group = {group: tuple(members) for group, members in groupby(ordered, key=lambda r: r.group)}
        return [RolloutGroup(prompt, by_group[place]) for place, prompt in enumerate(prompts)]

    def text(self, tokens: Sequence[int], stop_token: bool) -> str:
        """A response as people and rewards read it, special tokens included, without the token or text that ends it."""
        text = self.tokenizer.decode(list(tokens[:-1] if stop_token else tokens), clean_up_tokenization_spaces=False)
        ends = [text.index(mark) for mark in self.stop if mark in text]
        return text[: min(ends)] if ends else text

    def _rollout(
        self,
        group: int,
        prompt: Prompt,
        completion: Completion,
        verdict: Verdict,
        text: str,
        sampling: Sampling,
        step: int,
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
            key=(self.seed, step, prompt.index, completion.sample),
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
