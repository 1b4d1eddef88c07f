"""Invariant 7: after any number of samples each source is within one sample of its share, exactly."""

import math
from fractions import Fraction

import numpy as np
import pytest

from prism_mcore.data.mixture import Mixture


def worst_gap(weights: list[float], start: int, num_samples: int) -> Fraction:
    """Largest |count - n * share| over n in (start, start + num_samples], in exact arithmetic; checks ordinals too."""
    mixture = Mixture(weights)
    exact = [Fraction(repr(float(weight))) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    sources, ordinals = mixture.locate(np.arange(start, start + num_samples))
    before = mixture.counts(start)
    assert before.sum() == start
    worst = Fraction(0)
    for source, share in enumerate(shares):
        drawn = np.flatnonzero(sources == source)
        assert np.array_equal(ordinals[drawn], before[source] + np.arange(len(drawn)))
        # The gap is extreme just before and just after a draw.
        counts = before[source] + np.arange(len(drawn) + 1)
        after = np.concatenate([[0], drawn + 1]) + start
        until = np.concatenate([drawn, [num_samples]]) + start
        for count, first, last in zip(counts.tolist(), after.tolist(), until.tolist(), strict=True):
            worst = max(worst, count - first * share, last * share - count)
    return worst


PAPER_MCS = [5, 5, 10, 7, 20, 3, 10, 13.75, 13.75, 7.75, 4.75]


@pytest.mark.parametrize(
    "weights",
    [
        [1.0],
        [1, 1],
        PAPER_MCS,
        [0.3, 0.3, 0.2, 0.2],
        [0.999, 0.001],
        [1 / 3, 1 / 3, 1 / 3],
        [math.pi, math.e, 0.0, 0.01],
    ],
)
@pytest.mark.parametrize("start", [0, 9_999_000])
def test_counts_stay_within_one_sample_of_the_shares(weights, start):
    assert worst_gap(weights, start, 3000) < 1


@pytest.mark.parametrize("seed", range(24))
def test_counts_stay_within_one_sample_for_random_weights(seed):
    rng = np.random.default_rng(seed)
    num_sources = int(rng.integers(2, 25))
    weights = [
        rng.random(num_sources),
        rng.random(num_sources) ** 5 + 1e-3,
        rng.dirichlet(np.full(num_sources, 0.3)) + 1e-3,
    ]
    assert worst_gap(weights[seed % 3].tolist(), int(rng.integers(0, 10**7)), 2500) < 1


def test_locate_does_not_depend_on_how_it_is_asked():
    mixture = Mixture([0.37, 0.21, math.sqrt(0.1)])
    samples = np.arange(5000)
    sources, ordinals = mixture.locate(samples)
    shuffled = np.random.default_rng(0).permutation(samples)
    again = Mixture([0.37, 0.21, math.sqrt(0.1)]).locate(shuffled)
    assert np.array_equal(again[0], sources[shuffled]) and np.array_equal(again[1], ordinals[shuffled])


def test_a_weight_of_zero_is_never_drawn():
    assert Mixture([1, 0, 2]).counts(300_000).tolist() == [100_000, 0, 200_000]


@pytest.mark.parametrize(
    ("weights", "message"), [([1, -1], "must be >= 0"), ([0, 0], "not all 0"), ([1, 1e-8], r"sources\[1\]")]
)
def test_impossible_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(weights)
