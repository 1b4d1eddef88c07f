"""What a score of a benchmark is worth: averages over samples, intervals over questions, differences, choices of steps.

The question is the unit: samples of one question are not independent of each other. Every bootstrap therefore draws
questions, and within each drawn question its samples anew.
"""

# q questions, n samples of each, B bootstrap draws, t steps of a run

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

DRAWS = 10_000
LEVEL = 0.95  # of intervals
POWER = 0.8  # with which the smallest difference is found

CODE, MATH, SCIENCE = ("livecodebench", "codeforces"), ("aime24", "aime25", "math500"), ("gpqa",)  # PRISM, appendix B
SIX = CODE + MATH + SCIENCE


@dataclass(frozen=True)
class Counts:
    """Of each question, how many of its samples are right: `Counts(right=[3, 0], samples=[4, 4])`."""

    right: np.ndarray  # [q] int64
    samples: np.ndarray  # [q] int64, at least 1

    @staticmethod
    def of(verdicts: Sequence[Sequence[float]]) -> "Counts":
        """From each question's verdicts, 1 or 0."""
        return Counts(np.array([sum(map(bool, v)) for v in verdicts]), np.array([len(v) for v in verdicts]))

    def __post_init__(self) -> None:
        if not len(self.right) or self.samples.min() < 1:
            raise ValueError("statistics need at least one question, and a sample of each")

    @property
    def shares(self) -> np.ndarray:
        """[q]: of each question's samples, the right ones."""
        return self.right / self.samples

    def take(self, chosen: np.ndarray) -> "Counts":
        return Counts(self.right[chosen], self.samples[chosen])


@dataclass(frozen=True)
class Interval:
    """`Interval(0.27, 0.13, 0.41, "bootstrap")`: an estimate and where it may lie at LEVEL."""

    value: float
    low: float
    high: float
    method: str


def average(counts: Counts) -> float:
    """avg@n, which is often called pass@1: the mean over questions of the share of samples that are right."""
    return float(counts.shares.mean())


def pass_at(counts: Counts, k: int) -> float:
    """Unbiased pass@k: mean over questions of 1 - C(n - c, k) / C(n, k) (Chen et al., arXiv 2107.03374).

    Raises ValueError where a question has fewer than k samples.
    """
    if counts.samples.min() < k:
        raise ValueError(f"pass@{k} of {counts.samples.min()} samples; needed: at least {k} of each question")
    return float(
        np.mean([1 - _none_right(int(n), int(c), k) for n, c in zip(counts.samples, counts.right, strict=True)])
    )


def _none_right(n: int, c: int, k: int) -> float:
    return math.comb(n - c, k) / math.comb(n, k)


def majority(answers: Sequence[Sequence[Hashable | None]], right: Sequence[Sequence[float]]) -> float:
    """maj@n: the mean over questions of whether the answer given most often is right; a tie counts by its right share.

    answers: of each question and sample, what stands for its answer; right answers all count as the same, and None,
    no answer, has no vote.
    """
    scores = []
    for given, verdicts in zip(answers, right, strict=True):
        votes = Counter(
            ("right",) if verdict else ("wrong", answer)
            for answer, verdict in zip(given, verdicts, strict=True)
            if answer is not None or verdict
        )
        most = max(votes.values(), default=0)
        tied = [answer for answer, count in votes.items() if count == most]
        scores.append(tied.count(("right",)) / len(tied) if tied else 0.0)
    return float(np.mean(scores))


# --- intervals --------------------------------------------------------------------------------------------------------


def interval(counts: Counts, *, seed: int = 0, draws: int = DRAWS) -> Interval:
    """avg@n with its bootstrap interval over questions, samples nested.

    Where every verdict is the same no draw differs: then the exact (Clopper-Pearson) interval of that many questions.
    """
    value = average(counts)
    if value in (0.0, 1.0):
        reach = _exact_reach(len(counts.right))
        low, high = (0.0, reach) if value == 0 else (1 - reach, 1.0)
        return Interval(value, low, high, "exact")
    random = np.random.default_rng(seed)
    chosen = random.integers(len(counts.right), size=(draws, len(counts.right)))
    low, high = _bounds(_resampled(counts, chosen, random))
    return Interval(value, low, high, "bootstrap")


def _exact_reach(questions: int) -> float:
    """How far from 0 the share may be where none of so many questions is right (Clopper and Pearson)."""
    return 1 - ((1 - LEVEL) / 2) ** (1 / questions)


def standard_error(counts: Counts) -> float:
    """Of avg@n over another draw of questions and samples: the questions' shares vary by both."""
    q = len(counts.right)
    return float(counts.shares.std(ddof=1) / math.sqrt(q)) if q > 1 else math.nan


@dataclass(frozen=True)
class Difference:
    """b - a on the same questions, its interval, and how often a draw lies on the other side of 0, twice (p)."""

    value: float
    low: float
    high: float
    p: float
    questions: int


def paired(a: Counts, b: Counts, *, seed: int = 0, draws: int = DRAWS) -> Difference:
    """Paired bootstrap: each draw takes the same questions of both, and samples of its own within each.

    Where no draw differs, as where neither has anything right, the exact interval of that many questions stands for it.
    """
    if len(a.right) != len(b.right):
        raise ValueError(f"paired results need the same questions; got {len(a.right)} and {len(b.right)}")
    random = np.random.default_rng(seed)
    chosen = random.integers(len(a.right), size=(draws, len(a.right)))
    differences = _resampled(b, chosen, random) - _resampled(a, chosen, random)
    value = average(b) - average(a)
    low, high = _bounds(differences)
    if np.ptp(differences) == 0.0:
        reach = _exact_reach(len(a.right))
        low, high = max(-1.0, value - reach), min(1.0, value + reach)
    beyond = min(np.sum(differences <= 0), np.sum(differences >= 0))
    return Difference(value, low, high, float(min(1.0, 2 * (beyond + 1) / (draws + 1))), len(a.right))


def smallest_difference(counts: Counts, other: Counts | None = None) -> float:
    """The smallest true difference of avg@n that a two-sided test at 1 - LEVEL finds with probability POWER.

    other: the result that this one is paired with; without one, a result of the same spread on the same questions whose
    shares are independent of these, which is the most that pairing may have to do without. Where all questions agree
    their spread is taken as if two more had been right and two more wrong (Agresti and Coull).
    """
    if other is not None:
        spread = (other.shares - counts.shares).std(ddof=1) if len(counts.right) > 1 else 0.0
    else:
        spread = math.sqrt(2) * (counts.shares.std(ddof=1) if len(counts.right) > 1 else 0.0)
    q = len(counts.right)
    if spread == 0.0:
        share = (counts.shares.sum() + 2) / (q + 4)
        spread = math.sqrt(2 * share * (1 - share))
    normal = NormalDist()
    return float((normal.inv_cdf((1 + LEVEL) / 2) + normal.inv_cdf(POWER)) * spread / math.sqrt(q))


def _resampled(counts: Counts, chosen: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """avg@n [B] of drawn questions [B, q]: n verdicts drawn anew from n, c of them right, are binomial."""
    samples = counts.samples[chosen]
    return (random.binomial(samples, counts.shares[chosen]) / samples).mean(1)


def _bounds(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


# --- the paper's averages and choices of a checkpoint -----------------------------------------------------------------


def plain_average(scores: Mapping[str, float]) -> float:
    """The mean of the six benchmarks, each counting once, as on PRISM's project page."""
    return float(np.mean([_score(scores, name) for name in SIX]))


def domain_average(scores: Mapping[str, float]) -> float:
    """PRISM's AVG (appendix B): the mean of three domains' means, so that GPQA counts as much as all of math."""
    return float(np.mean([np.mean([_score(scores, name) for name in domain]) for domain in (CODE, MATH, SCIENCE)]))


def _score(scores: Mapping[str, float], name: str) -> float:
    if name not in scores:
        raise ValueError(f"the average needs all of {', '.join(SIX)}; {name} is missing")
    return scores[name]


Table = Mapping[str, Sequence[Counts]]  # benchmark -> a result per step, on the same questions


@dataclass(frozen=True)
class Choice:
    """Steps chosen of a run and what they score: `Choice({"aime24": 3, "gpqa": 0}, {"aime24": 0.4, "gpqa": 0.5})`."""

    steps: dict[str, int]
    scores: dict[str, float]


def one_step(table: Table, mean: Callable[[Mapping[str, float]], float] | None = None) -> Choice:
    """The step with the best average over benchmarks, for all of them (PRISM's table 11); the first of equals."""
    steps = range(len(next(iter(table.values()))))
    scores = [{name: average(results[step]) for name, results in table.items()} for step in steps]
    best = max(steps, key=lambda step: (mean or _mean)(scores[step]))
    return Choice(dict.fromkeys(table, best), scores[best])


def best_of_each(table: Table, mean: Callable[[Mapping[str, float]], float] | None = None) -> Choice:
    """The best step of each benchmark by itself (PRISM's section 9.2 and its page): a maximum, hence optimistic."""
    steps = {name: max(range(len(results)), key=lambda s: average(results[s])) for name, results in table.items()}
    return Choice(steps, {name: average(table[name][step]) for name, step in steps.items()})


def optimism(
    choose: Callable[..., Choice],
    table: Table,
    mean: Callable[[Mapping[str, float]], float] | None = None,
    *,
    seed: int = 0,
    splits: int = 200,
) -> float:
    """How much the mean of chosen steps promises too much: chosen on one half of the questions, measured on the other.

    The mean over random halves of (score where it was chosen - score on the other half). Choosing on half of the
    questions is noisier than choosing on all, so that this is an upper estimate for all of them.
    """
    random, gaps = np.random.default_rng(seed), []
    for _ in range(splits):
        halves: tuple[dict[str, list[Counts]], dict[str, list[Counts]]] = ({}, {})
        for name, results in table.items():
            order = random.permutation(len(results[0].right))
            middle = len(order) // 2
            for half, chosen in zip(halves, (order[:middle], order[middle:]), strict=True):
                half[name] = [counts.take(chosen) for counts in results]
        for here, there in (halves, halves[::-1]):
            choice = choose(here, mean)
            elsewhere = {name: average(there[name][step]) for name, step in choice.steps.items()}
            gaps.append((mean or _mean)(choice.scores) - (mean or _mean)(elsewhere))
    return float(np.mean(gaps))


def _mean(scores: Mapping[str, float]) -> float:
    return float(np.mean(list(scores.values())))
