"""What an RL run reports: metrics.jsonl, validation.jsonl, tensorboard, a console line, and the rollouts themselves."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from rich.table import Table

from prism_mcore.batch import Rollout, RolloutGroup
from prism_mcore.console import plain, say, show
from prism_mcore.rl.advantage import advantages
from prism_mcore.rl.rollout import UNFINISHED
from prism_mcore.train.metrics import (
    STEPS_FILE,
    VALIDATION_FILE,
    Records,
    StepClock,
    clock_text,
    peak_memory_gb,
    short,
)

if TYPE_CHECKING:
    from prism_mcore.rl.run import PolicyRun
    from prism_mcore.rl.step import PolicyStats

CORRECT = "correct"  # the part of a reward that says whether the answer is right
PERCENTILES = (10, 50, 90, 99)
WORK = ("generation", "rewards", "reference", "policy", "update")  # parts of a step; the rest is overhead


class RLMetrics:
    """Writes down each step, its rollouts and the held-out answers; on rank 0, and quietly nothing elsewhere."""

    def __init__(self, run: PolicyRun, start: int, clock: StepClock):
        settings = run.settings
        self.steps, self.every, self.show = settings.train.steps, settings.log.every, settings.rl.show
        self.run_dir, self.settings, self.clock = settings.run_dir, settings.rl, clock
        self.rollouts, self.decode = run.rollouts, run.rollouts.text
        self.run = run
        self._step_times: deque[float] = deque(maxlen=20)
        files = (STEPS_FILE, VALIDATION_FILE)
        self.records = Records(settings, files, start, rank=run.groups.rank)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.records.close()

    def log(
        self,
        step: int,
        groups: Sequence[RolloutGroup],
        updates: Sequence[PolicyStats],
        lr: float,
        tokens: int,
    ) -> None:
        """Write down a step: what `rollout_metrics` and `update_metrics` say, step, lr, tokens (trained on so far),
        rollout/unfinished (carried to the next step), groups/drawn (those that dynamic sampling left out included),
        generation/tokens_per_s (all replicas, until the slowest is
        done), generation/idle_share (of rank 0's slots), time/step_s, time/<part>_s, time/overhead_share (of what is no
        part of WORK) and memory/peak_gb (of rank 0). NaN and Inf become null.
        """
        step_s = self.clock.step_s
        self._step_times.append(step_s)
        if not self.records:
            return
        worked = sum(self.clock.parts.get(f"time/{part}_s", 0.0) for part in WORK)
        record = {
            "step": step,
            **update_metrics(updates),
            "lr": lr,
            "tokens": tokens,
            **rollout_metrics(groups),
            "rollout/unfinished": sum(r.finish == UNFINISHED for g in self.run.unfinished for r in g.rollouts),
            "groups/drawn": self.run.drawn,
            "generation/tokens_per_s": self.rollouts.generated / self.rollouts.generation_s,
            "generation/idle_share": self.rollouts.idle_share,
            "time/step_s": step_s,
            **self.clock.parts,
            "time/overhead_share": 1 - worked / step_s,
            "memory/peak_gb": peak_memory_gb(),
        }
        self.records.write(STEPS_FILE, record)
        if step % self.every == 0 or step == self.steps:
            say(self._line(record, bool(updates)), stderr=True)
            if self.show:
                show(rollout_table(groups, self.decode, self.show), stderr=True)

    def lacks_validation(self, start: int) -> bool:
        """Is there no validation of what the run starts from yet? Every rank asks."""
        return self.records.lacks(VALIDATION_FILE, start)

    def log_validation(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Write down the held-out answers after a step: validation/<what `rollout_metrics` says>."""
        if not self.records or not groups:
            return
        found = rollout_metrics(groups)
        record = {"step": step, **{f"validation/{key.removeprefix('rollout/')}": v for key, v in found.items()}}
        self.records.write(VALIDATION_FILE, record)
        right = found.get(f"reward/{CORRECT}", math.nan)
        said = f"correct {right:.3f} reward {found['reward/mean']:.3f}" if math.isfinite(right) else "none verified"
        say(
            f"step {step:>{len(str(self.steps))}}/{self.steps} | held out: {said}"
            f" of {int(found['rollout/count'])} samples",
            stderr=True,
        )

    def write_rollouts(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """runs/<name>/rollouts/step_00000012.jsonl, one readable line per rollout; marks the clock: records."""
        if not self.records:
            return
        folder = self.run_dir / "rollouts"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step_{step:08d}.jsonl"
        part = path.with_name(f".tmp_{path.name}")
        every = advantages(groups, self.settings.advantage, self.settings.advantage_eps)
        with part.open("w", encoding="utf-8") as file:
            for group, of_group in zip(groups, every, strict=True):
                for rollout, advantage in zip(group.rollouts, of_group.tolist(), strict=True):
                    record = readable(group, rollout, advantage, self.decode)
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        part.replace(path)
        self.clock.mark("records")

    def _line(self, record: dict[str, Any], learnt: bool = True) -> str:
        step = record["step"]
        lost = record["verifier/timeout"] + record["verifier/crash"]
        verified = math.isfinite(record["reward/mean"])
        update = [
            f"entropy {record['entropy']:.3f}" if learnt else "",
            f"KL {record['kl']:.2e}" if record.get("kl") else "",
            f"gap {record['rl/logprob_gap_max']:.1e}",
            f"lr {record['lr']:.2e}",
            f"grad {record['grad_norm']:.3f}",
        ]
        parts = [
            f"step {step:>{len(str(self.steps))}}/{self.steps}",
            f"reward {record['reward/mean']:.3f}" if verified else "",
            f"correct {record[f'reward/{CORRECT}']:.3f}" if verified and f"reward/{CORRECT}" in record else "",
            f"not verified {lost} of {record['rollout/count']}" if lost else "",
            f"length {record['rollout/length_mean']:.0f}",
            *(update if learnt else ["nothing to learn"]),
            f"{short(record['generation/tokens_per_s'])} tok/s",
            f"ETA {clock_text((self.steps - step) * sum(self._step_times) / len(self._step_times))}",
        ]
        return " | ".join(part for part in parts if part)


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """reward/mean and std, reward/<part>, reward/correct/<source>; shares of groups solved by all, by none, and without
    spread; rollout/length percentiles in tokens, rollout/truncated, verifier/<status> counts.

    Rewards are those of valid rollouts, and a group without any is neither solved by all nor by none; the rest counts
    them all. Truncated is what neither a stop token nor a stop text ended.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    valid = [rollout for rollout in rollouts if rollout.valid]
    rewards = np.array([rollout.reward for rollout in valid])
    lengths = np.array([len(rollout.tokens) for rollout in rollouts])
    solved = [[is_correct(rollout) for rollout in group.rollouts if rollout.valid] for group in groups]
    spread = [len({rollout.reward for rollout in group.rollouts if rollout.valid}) > 1 for group in groups]
    return {
        "reward/mean": _mean(rewards),
        "reward/std": float(rewards.std()) if len(rewards) else math.nan,
        **{f"reward/{part}": _mean([r.rewards.get(part, 0.0) for r in valid]) for part in _parts(valid)},
        **{f"reward/{CORRECT}/{source}": value for source, value in _by_source(groups).items()},
        "groups/solve_all": _mean([bool(group) and all(group) for group in solved]),
        "groups/solve_none": _mean([bool(group) and not any(group) for group in solved]),
        "groups/no_spread": _mean([not differs for differs in spread]),
        "rollout/count": len(rollouts),
        "rollout/length_mean": _mean(lengths),
        **{f"rollout/length_p{p}": float(np.percentile(lengths, p)) if len(lengths) else math.nan for p in PERCENTILES},
        "rollout/length_max": int(lengths.max(initial=0)),
        "rollout/truncated": _mean([rollout.finish != "stop" for rollout in rollouts]),
        **{f"verifier/{status}": sum(r.verifier == status for r in rollouts) for status in ("timeout", "crash")},
    }


def update_metrics(updates: Sequence[PolicyStats]) -> dict[str, float]:
    """loss, grad_norm, ratio_max, the gap and every mean of `LossTerms.means`, over the updates of a step.

    Means are weighted by tokens, the gap's by on-policy tokens; maxima are the largest; grad_norm is the last one's.
    """

    def mean(values: Sequence[float], tokens: Sequence[int]) -> float:
        counted = [(value * count) for value, count in zip(values, tokens, strict=True) if count]
        return sum(counted) / sum(tokens) if counted else math.nan

    tokens = [stats.tokens for stats in updates]
    names = updates[0].means if updates else ()
    return {
        "loss": _mean([stats.loss for stats in updates]),
        "grad_norm": updates[-1].grad_norm if updates else math.nan,
        **{name: mean([stats.means[name] for stats in updates], tokens) for name in names},
        "ratio_max": max((stats.ratio_max for stats in updates), default=math.nan),
        "rl/logprob_gap_mean": mean([stats.gap_mean for stats in updates], [stats.on_policy for stats in updates]),
        "rl/logprob_gap_max": max((stats.gap.size for stats in updates), default=math.nan),
    }


def is_correct(rollout: Rollout) -> bool:
    """Is the answer right? Where no part says so, any positive reward does."""
    return rollout.rewards.get(CORRECT, rollout.reward) > 0


def readable(group: RolloutGroup, rollout: Rollout, advantage: float, decode: Callable[..., str]) -> dict[str, Any]:
    """A rollout as a line of the rollouts file."""
    return {
        "prompt": group.prompt.text,
        "response": decode(rollout.tokens, rollout.stop_token),
        "answer": group.prompt.record.get("answer"),
        "reward": rollout.reward,
        "rewards": dict(rollout.rewards),
        "advantage": advantage,
        "finish": rollout.finish,
        "verifier": rollout.verifier,
        "source": group.prompt.source,
        "prompt_index": rollout.prompt,
        "sample": rollout.sample,
        "tokens": len(rollout.tokens),
        "mean_logprob": _mean(rollout.logprobs) if len(rollout.tokens) else None,
    }


def rollout_table(groups: Sequence[RolloutGroup], decode: Callable[..., str], count: int) -> Table:
    """The first rollouts of the first groups."""
    table = Table(show_lines=True)
    for column in ("prompt", "response", "answer", "reward", "tokens"):
        table.add_column(column, justify="right" if column in ("reward", "tokens") else "left")
    for group in groups[:count]:
        rollout = group.rollouts[0]
        response = decode(rollout.tokens, rollout.stop_token)
        table.add_row(
            *(_cut(text) for text in (group.prompt.text, response, str(group.prompt.record.get("answer", "")))),
            f"{rollout.reward:.2f}" if rollout.valid else rollout.verifier,
            str(len(rollout.tokens)),
        )
    return table


def _cut(text: str, longest: int = 400) -> str:
    return plain(text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}")


def _parts(rollouts: Sequence[Rollout]) -> list[str]:
    return sorted({part for rollout in rollouts for part in rollout.rewards})


def _by_source(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Share of right answers by prompt source, where there are several."""
    right: dict[str, list[bool]] = {}
    for group in groups:
        right.setdefault(group.prompt.source, []).extend(is_correct(r) for r in group.rollouts if r.valid)
    return {source: _mean(answers) for source, answers in sorted(right.items())} if len(right) > 1 else {}


def _mean(values: Sequence[Any] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan
