"""The permutation of samples: a bijection, different under every key, without visible structure."""

import numpy as np
import pytest

from prism_mcore.data.order import key_of, permute, shuffled_range


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 65_537])
def test_permutes_every_range(size):
    out = permute(np.arange(size), size, key_of(7, 1, 2))
    assert np.array_equal(np.sort(out), np.arange(size))
    if size > 100:
        assert (out == np.arange(size)).mean() < 0.05


def test_one_at_a_time_equals_in_blocks():
    key, size = key_of(3), 10_000_019
    index = np.array([0, 1, 17, 9_999_999, size - 1])
    assert [int(permute(np.array([i]), size, key)[0]) for i in index] == permute(index, size, key).tolist()


def test_keys_per_element_equal_keys_one_by_one():
    epochs = np.array([0, 0, 1, 5])
    together = permute(np.array([2, 3, 2, 2]), 77, key_of(9, 4, epochs))
    alone = [
        int(permute(np.array([i]), 77, key_of(9, 4, int(e)))[0]) for i, e in zip([2, 3, 2, 2], epochs, strict=True)
    ]
    assert together.tolist() == alone


def test_keys_change_the_order():
    orders = {tuple(permute(np.arange(50), 50, key_of(*parts))) for parts in [(0, 0), (0, 1), (1, 0), (1, 1), (10,)]}
    assert len(orders) == 5


def test_first_samples_are_spread_evenly():
    """Over 2,000 epochs the first of 10 samples is each one about equally often: chi-square with 9 degrees of
    freedom.
    """
    firsts = permute(np.zeros(2000, np.int64), 10, key_of(1, 2, np.arange(2000)))
    expected = 200
    assert (((np.bincount(firsts, minlength=10) - expected) ** 2) / expected).sum() < 28  # p = 0.001


def test_neighbours_do_not_stay_neighbours():
    out = permute(np.arange(100_000), 100_000, key_of(5))
    assert (np.abs(np.diff(out)) < 100).mean() < 0.01  # 0.2% by chance


def test_shuffled_range_is_a_permutation():
    order = shuffled_range(1000, key_of(2))
    assert np.array_equal(np.sort(order), np.arange(1000)) and not np.array_equal(order, np.arange(1000))
