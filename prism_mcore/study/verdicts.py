"""Does each of the paper's claims hold in a study? Shown, not shown or not measured, by rules that are fixed here.

A rule has to hold for every model and every seed. A score is above another where its interval lies above the other's.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prism_mcore.study.results import Results
from prism_mcore.study.settings import Claims

Outcome = Literal["shown", "not shown", "not measured"]
KEPT = 1.01  # general loss is kept where it rises by less than 1%
MOST, FEW = 0.5, 0.1  # shares of weights that changed by more than 1%


@dataclass(frozen=True)
class Verdict:
    """What is claimed, what came out, and the numbers it rests on, a line each."""

    claim: str
    outcome: Outcome
    numbers: tuple[str, ...]
    note: str = ""


Cell = tuple[str, int]  # model, seed


def verdicts(claims: Claims, results: Results) -> list[Verdict]:
    """One for each claim, in the paper's order."""
    judge = _Judge(claims, results)
    return [judge.domains(), judge.rl(), judge.science(), judge.weights(), judge.similarity(), judge.construction()]


class _Judge:
    def __init__(self, claims: Claims, results: Results):
        self.claims, self.results = claims, results
        found = (results.losses, results.scores, results.rewards)
        self.cells: list[Cell] = list(dict.fromkeys((model, seed) for part in found for _, model, seed in part))

    def domains(self) -> Verdict:
        """Every domain's loss falls in a mid-training that has it, and the general one is kept."""
        claim = "Mid-training lifts its domains and keeps general text"
        rows = []
        for arm in (*self.claims.midtrained, self.claims.general):
            changes: dict[str, list[tuple[float, float]]] = {}
            for model, seed in self.cells:
                for name, pair in self.results.losses.get((arm, model, seed), {}).items():
                    if name.startswith("validation/loss/"):
                        changes.setdefault(name.removeprefix("validation/loss/"), []).append(pair)
            rows += [(arm, domain, pairs) for domain, pairs in changes.items()]
        judged = [row for row in rows if row[0] != self.claims.general]
        if not judged:
            return Verdict(claim, "not measured", ())
        held = [
            all(last < first * KEPT if domain == self.claims.general_domain else last < first for first, last in pairs)
            for _, domain, pairs in judged
        ]
        failed = [f"{arm}: {domain}" for (arm, domain, _), ok in zip(judged, held, strict=True) if not ok]
        numbers = [
            f"{arm}: {domain} {_mean([a for a, _ in pairs])} -> {_mean([b for _, b in pairs])} nats"
            for arm, domain, pairs in rows
        ]
        return Verdict(claim, _outcome(not failed), tuple(numbers), f"fails in {', '.join(failed)}" if failed else "")

    def rl(self) -> Verdict:
        """RL lifts every mid-trained model's score on its task, and not the base's."""
        claim, task = "RL gains on the mid-trained model and not on the raw base", self.claims.task
        pairs = {start: self._gains(start, after, task) for start, after in self.claims.rl.items()}
        mid = {start: gains for start, gains in pairs.items() if start != self.claims.base and gains}
        base = pairs.get(self.claims.base, [])
        if not mid or not base:
            return Verdict(claim, "not measured", ())
        gained = {start: all(_above(after, before) for before, after in gains) for start, gains in mid.items()}
        base_gained = any(_above(after, before) for before, after in base)
        numbers = tuple(self._gain_line(start, gains) for start, gains in pairs.items() if gains)
        failed = [f"no gain from {start}" for start, ok in gained.items() if not ok]
        failed += ["the base gains, too"] * base_gained
        return Verdict(claim, _outcome(not failed), numbers, "; ".join(failed))

    def science(self) -> Verdict:
        """After the same RL, science is above where mid-training had it, by more than what RL's own mixture changes."""
        claim = "Science at mid-training decides science after RL; RL's mixture matters less"
        c, numbers, held = self.claims, [], []
        for model, seed in self.cells:
            have = [
                self._score(arm, c.science_task, model, seed)
                for arm in (c.with_science, c.without_science, c.with_science_rl)
            ]
            if any(score is None for score in have):
                continue
            mixed, without, plain = (score for score in have if score is not None)
            by_midtraining = mixed["value"] - without["value"]
            by_rl = mixed["value"] - plain["value"]
            held.append(_above(mixed, without) and abs(by_rl) < by_midtraining)
            numbers.append(
                f"{model}, seed {seed}: {_percent(mixed)} with both, {_percent(without)} without it at mid-training,"
                f" {_percent(plain)} without it in RL"
            )
        if not held:
            return Verdict(claim, "not measured", ())
        note = "the facts are a closed set that mid-training alone has: in part this holds by construction"
        return Verdict(claim, _outcome(all(held)), tuple(numbers), note)

    def weights(self) -> Verdict:
        """Most weights change by more than 1% in mid-training and few in RL; beside the control of RL's schedule."""
        claim = "Mid-training changes most weights, RL few"
        shares = {what: self._shares(analysis) for what, analysis in self.claims.changes.items()}
        if not shares.get("midtraining") or not shares.get("rl"):
            return Verdict(claim, "not measured", ())
        shown = min(shares["midtraining"]) > MOST and max(shares["rl"]) < FEW
        numbers = tuple(
            f"{what}: {_mean([100 * v for v in found])}% changed" for what, found in shares.items() if found
        )
        if not shares.get("control"):
            return Verdict(claim, _outcome(shown), numbers, "without a control of the same schedule it says little")
        ratio = statistics.fmean(shares["control"]) / max(1e-12, statistics.fmean(shares["rl"]))
        note = f"supervised training with RL's schedule changes {ratio:.2g} times as many: " + (
            "the share is the schedule's, not RL's" if 0.5 < ratio < 2 else "the share is not the schedule's alone"
        )
        return Verdict(claim, _outcome(shown), numbers, note)

    def similarity(self) -> Verdict:
        return Verdict("CKA between mid-trained and RL stays near 1", "not measured", ())

    def construction(self) -> Verdict:
        """Steps of RL without a gradient: there the weights stay what they are, whatever the method."""
        claim = "Without reward there is no gradient (by construction, no finding)"
        idle = {run: share for run, share in self.results.idle_steps.items() if share > 0}
        numbers = [
            f"{arm} of {model}, seed {seed}: {share:.0%} of its steps" for (arm, model, seed), share in idle.items()
        ]
        if not self.results.idle_steps:
            return Verdict(claim, "not measured", ())
        return Verdict(claim, _outcome(bool(idle)), tuple(numbers), "" if idle else "every step had a gradient")

    def _gains(self, before: str, after: str, task: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        pairs = [(self._score(before, task, *cell), self._score(after, task, *cell)) for cell in self.cells]
        return [(one, two) for one, two in pairs if one is not None and two is not None]

    def _gain_line(self, start: str, gains: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
        befores, afters = ([100 * pair[i]["value"] for pair in gains] for i in (0, 1))
        passes = [100 * max(before["pass"].values()) for before, _ in gains]
        most = max(int(k) for k in gains[0][0]["pass"])
        return f"{start}: {_mean(befores)}% -> {_mean(afters)}% (pass@{most} before: {_mean(passes)}%)"

    def _score(self, arm: str, task: str, model: str, seed: int) -> dict[str, Any] | None:
        """value, low, high and pass, of whichever evaluation has it."""
        for (name, of_model, of_seed), tasks in self.results.scores.items():
            if name.split(" of ", 1)[1] == arm and (of_model, of_seed) == (model, seed) and task in tasks:
                return {**tasks[task]["score"], "pass": tasks[task]["pass"]}
        return None

    def _shares(self, analysis: str) -> list[float]:
        found = self.results.weights
        return [values["changed_1pct"] for (name, _, _), values in found.items() if name == analysis]


def _above(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one["low"] > other["high"])


def _outcome(held: bool) -> Outcome:
    return "shown" if held else "not shown"


def _percent(score: dict[str, Any]) -> str:
    return f"{100 * score['value']:.1f}% ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def _mean(values: Sequence[float]) -> str:
    """Mean over models and seeds, with the lowest and highest."""
    mean = f"{statistics.fmean(values):.3g}"
    return f"{mean} [{min(values):.3g}, {max(values):.3g}]" if len(values) > 1 else mean
