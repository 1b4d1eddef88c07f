"""Statistics against closed forms, simulation and scipy, and PRISM's averages from its own numbers."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from prism_mcore.evaluate.statistics import (
    Counts,
    average,
    best_of_each,
    domain_average,
    interval,
    majority,
    one_step,
    optimism,
    paired,
    pass_at,
    plain_average,
    smallest_difference,
    standard_error,
)


def counts(right, samples=4):
    right = np.array(right)
    return Counts(right, np.full(len(right), samples))


def drawn(seed, questions, samples, spread=0.3, shift=0.0):
    """Questions of unlike difficulty, and samples of them."""
    random = np.random.default_rng(seed)
    shares = np.clip(random.normal(0.5 + shift, spread, questions), 0.02, 0.98)
    return Counts(random.binomial(samples, shares), np.full(questions, samples))


def test_an_average_is_over_questions():
    assert average(Counts.of([[1, 0], [1, 1, 1, 1], [0]])) == pytest.approx((0.5 + 1 + 0) / 3)
    with pytest.raises(ValueError, match="at least one question"):
        Counts.of([])


@pytest.mark.parametrize("n, c, k", [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (7, 3, 7)])
def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_one(n, c, k):
    draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert pass_at(counts([c], n), k) == pytest.approx(sum(map(any, draws)) / len(draws))
    with pytest.raises(ValueError, match=f"pass@8 of {n} samples"):
        pass_at(counts([c], n), 8)


def test_a_majority_votes_over_answers():
    right = [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    answers = [["7", "7.0", "5", "6", None], ["7", "5", "5", None, None], ["7", "5", None, None, None], [None] * 5]
    assert majority(answers, right) == pytest.approx((1 + 0 + 0.5 + 0) / 4)


def test_the_bootstrap_agrees_with_the_normal_interval_and_with_scipy():
    found = drawn(0, 500, 8)
    ours = interval(found)
    theirs = stats.norm.interval(0.95, average(found), standard_error(found))
    assert standard_error(found) == pytest.approx(stats.sem(found.shares))
    # Samples drawn anew add their own spread to that of the questions, which the shares hold already.
    within = found.shares * (1 - found.shares) / found.samples
    wider = math.sqrt(found.shares.var() + within.mean()) / math.sqrt(500)
    theirs = stats.norm.interval(0.95, average(found), wider)
    assert (ours.low, ours.high) == pytest.approx(theirs, abs=0.003) and ours.method == "bootstrap"
    one = Counts(np.array([1] * 37 + [0] * 63), np.full(100, 1))
    verdicts = np.array([1.0] * 37 + [0.0] * 63)
    expected = stats.bootstrap((verdicts,), np.mean, method="percentile", random_state=1).confidence_interval
    assert (interval(one).low, interval(one).high) == pytest.approx((expected.low, expected.high), abs=0.011)


def test_questions_are_the_unit_not_samples():
    """A thousand samples of the same thirty questions do not make the interval narrow."""
    few, many = interval(drawn(3, 30, 4)), interval(drawn(3, 30, 1000))
    assert many.high - many.low > 0.6 * (few.high - few.low)


@pytest.mark.parametrize("all_right", [False, True])
def test_where_all_verdicts_are_the_same_the_interval_is_exact(all_right):
    found = interval(counts([4 * all_right] * 30))
    exact = stats.binomtest(30 * all_right, 30).proportion_ci(method="exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high)) and found.method == "exact"
    assert (found.high - found.low) == pytest.approx(0.1157, abs=1e-4)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    random, shares = np.random.default_rng(5), np.linspace(0.05, 0.95, 4001)
    hits = 0
    for seed in range(200):
        chosen = random.choice(shares, 60)
        found = interval(Counts(random.binomial(4, chosen), np.full(60, 4)), seed=seed, draws=400)
        hits += found.low <= 0.5 <= found.high
    assert 183 <= hits <= 200  # samples drawn anew within questions make it a little wide, never narrow


def test_pairs_show_what_single_results_do_not():
    """The same questions, one model 4 points better on each: paired it shows, unpaired it does not."""
    random = np.random.default_rng(0)
    shares = np.clip(random.normal(0.5, 0.3, 300), 0.05, 0.9)
    a = Counts(random.binomial(64, shares), np.full(300, 64))
    b = Counts(random.binomial(64, shares + 0.04), np.full(300, 64))
    found = paired(a, b)
    assert found.value == pytest.approx(average(b) - average(a)) and 0.02 < found.low < found.high < 0.06
    assert found.p < 0.01 and interval(a).high > interval(b).low
    assert smallest_difference(a, b) < 0.02 < 0.05 < smallest_difference(a)
    nothing = paired(counts([0] * 30), counts([0] * 30))
    assert (nothing.value, nothing.p) == (0.0, 1.0) and nothing.high == -nothing.low == interval(counts([0] * 30)).high
    same = paired(a, a)
    assert same.value == 0 and same.low < 0 < same.high and same.p > 0.5
    with pytest.raises(ValueError, match="the same questions; got 300 and 30"):
        paired(a, counts([1] * 30))


def test_a_paired_difference_is_that_of_scipys_bootstrap():
    random = np.random.default_rng(2)
    a, b = random.binomial(1, 0.5, 200), random.binomial(1, 0.6, 200)
    ours = paired(Counts(a, np.full(200, 1)), Counts(b, np.full(200, 1)))
    theirs = stats.bootstrap(
        (b, a), lambda x, y, axis: (x - y).mean(axis), paired=True, method="percentile", random_state=3
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.011)


def test_the_smallest_difference_is_found_in_four_of_five_experiments():
    """Of a z-test on independent results of that many questions, as it says."""
    questions, random = 200, np.random.default_rng(1)
    spread = math.sqrt(0.25)
    first = Counts(np.array([1] * 100 + [0] * 100), np.full(questions, 1))
    gap = smallest_difference(first)
    assert gap == pytest.approx((1.959964 + 0.841621) * math.sqrt(2) * spread / math.sqrt(questions), rel=0.01)
    found = 0
    for _ in range(2000):
        a, b = random.binomial(1, 0.5 - gap / 2, questions), random.binomial(1, 0.5 + gap / 2, questions)
        error = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / questions)
        found += abs(b.mean() - a.mean()) > 1.959964 * error
    assert 0.77 < found / 2000 < 0.84
    assert 0.1 < smallest_difference(counts([0] * 30)) < 0.25  # none right of 30: the spread is not taken for nothing


# PRISM, tables 6 and 11: (code, GPQA-D, AIME24, AIME25, MATH500) -> AVG by domains, and the page's plain mean.
PAPER = [
    ("Granite-3.3-8B", (2.07, 22.56, 0.46, 0.31, 26.09), 11.19, 8.93),
    ("Granite-3.3-8B, MCS", (10.58, 29.12, 37.18, 27.96, 81.11), 29.48, 32.75),
    ("LLaMA-3.1-8B", (0.04, 20.20, 0.05, 0.15, 6.51), 7.49, None),
    ("LLaMA-3.1-8B, MCS", (5.77, 21.04, 16.45, 19.32, 73.47), 21.07, None),
    ("Mistral-7B-v0.1", (0.07, 26.94, 0.00, 0.10, 1.68), 9.20, None),
    ("Mistral-7B-v0.1, MCS", (9.79, 24.07, 28.85, 24.27, 70.71), 25.05, None),
]


@pytest.mark.parametrize("name, scores, domains, plain", PAPER)
def test_the_papers_averages_come_out_of_its_scores(name, scores, domains, plain):
    """The paper gives the mean of the two code benchmarks, which both averages see only together."""
    code, gpqa, aime24, aime25, math500 = scores
    named = {"livecodebench": code, "codeforces": code, "gpqa": gpqa}
    named |= {"aime24": aime24, "aime25": aime25, "math500": math500}
    assert domain_average(named) == pytest.approx(domains, abs=0.0067)  # rounding of five numbers and of their mean
    if plain is not None:
        assert plain_average(named) == pytest.approx(plain, abs=0.0067)


def test_an_average_needs_all_six():
    with pytest.raises(ValueError, match=r"the average needs all of .*; codeforces is missing"):
        plain_average({"livecodebench": 1.0})


def run_of(seed, steps, questions, gain=0.0):
    """Results of a run's steps on two benchmarks; `gain` from step to step."""
    random = np.random.default_rng(seed)
    table = {}
    for name in ("aime24", "gpqa"):
        shares = np.clip(random.normal(0.4, 0.2, questions), 0.05, 0.6)
        table[name] = [
            Counts(random.binomial(4, np.clip(shares + gain * step, 0, 1)), np.full(questions, 4))
            for step in range(steps)
        ]
    return table


def test_both_choices_of_a_checkpoint():
    table = {
        "aime24": [counts([4, 0]), counts([2, 1]), counts([0, 0])],
        "gpqa": [counts([0, 0]), counts([1, 4]), counts([3, 3])],
    }
    together, apart = one_step(table), best_of_each(table)
    assert together.steps == {"aime24": 1, "gpqa": 1} and together.scores == {"aime24": 0.375, "gpqa": 0.625}
    assert apart.steps == {"aime24": 0, "gpqa": 2} and apart.scores == {"aime24": 0.5, "gpqa": 0.75}


def test_the_best_of_equal_steps_is_optimistic_by_what_split_halves_say():
    """Twenty steps that are all alike: the maximum's excess is that of the maximum of twenty draws."""
    gaps, excesses = [], []
    for seed in range(12):
        table = run_of(seed, 20, 60)
        gaps.append(optimism(best_of_each, table, seed=seed, splits=20))
        halves = {name: [c.take(np.arange(30)) for c in results] for name, results in table.items()}
        each = [max(map(average, r)) - np.mean(list(map(average, r))) for r in halves.values()]
        excesses.append(np.mean(each))
    assert np.mean(gaps) == pytest.approx(np.mean(excesses), rel=0.2) and np.mean(gaps) > 0.03
    assert optimism(one_step, run_of(0, 20, 60), splits=50) < optimism(best_of_each, run_of(0, 20, 60), splits=50)


def test_a_step_that_is_clearly_best_is_chosen_without_optimism():
    assert abs(optimism(best_of_each, run_of(1, 3, 400, gain=0.2), splits=50)) < 0.01
