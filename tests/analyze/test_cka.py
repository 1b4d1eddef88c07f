"""Linear CKA against its definition on features, a rotation, and what is known of its interval."""

import numpy as np
import pytest
import torch

from prism_mcore.analyze.cka import cka, gram, similarities


def draw(n, d, seed):
    return torch.randn(n, 3, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(x, y):
    """On features [n, d], as in the paper, not on products."""
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def test_products_give_what_features_give():
    x, y = draw(20, 7, 0), draw(20, 11, 1)
    y[:, :, :7] += x
    found = cka(gram(x), gram(y))
    for layer in range(3):
        assert float(found[layer]) == pytest.approx(by_definition(x[:, layer].numpy(), y[:, layer].numpy()), rel=1e-12)
    assert 0.1 < float(found.min()) < float(found.max()) < 0.95


def test_a_rotation_a_scale_and_a_shift_are_no_difference_and_another_stretch_is():
    x = draw(30, 8, 2)
    rotation = torch.linalg.qr(draw(8, 8, 3)[:, 0])[0]
    assert cka(gram(x), gram(x)).numpy() == pytest.approx(np.ones(3), abs=1e-12)
    assert cka(gram(x), gram(3 * x @ rotation + 5)).numpy() == pytest.approx(np.ones(3), abs=1e-12)
    assert float(cka(gram(x), gram(x * torch.arange(1, 9))).max()) < 0.95


def test_orthogonal_features_have_none_in_common():
    x, y = torch.zeros(4, 1, 1), torch.zeros(4, 1, 1)
    x[:, 0, 0], y[:, 0, 0] = torch.tensor([1.0, 1, -1, -1]), torch.tensor([1.0, -1, 1, -1])
    assert float(cka(gram(x), gram(y))) == pytest.approx(0.0, abs=1e-12)


def test_intervals_hold_the_value_repeat_and_shrink_with_prompts():
    x, noise = draw(400, 6, 4), draw(400, 6, 5)
    widths = []
    for n in (50, 400):
        first, second = gram(x[:n]), gram(x[:n] + noise[:n])
        found = similarities(first, second, draws=200, seed=1)
        assert found == similarities(first, second, draws=200, seed=1) != similarities(first, second, draws=200, seed=2)
        assert all(one.low < one.cka < one.high for one in found)
        widths.append(found[0].high - found[0].low)
    assert widths[0] / widths[1] == pytest.approx(8**0.5, rel=0.35)


def test_the_interval_covers_what_as_many_prompts_give_on_average():
    """95% of the draws of 100 prompts would; of 60 at least 51, which luck alone misses once in 500 times."""
    x, noise = draw(6000, 6, 6)[:, :1], draw(6000, 6, 7)[:, :1]
    parts = [slice(start, start + 100) for start in range(0, 6000, 100)]
    found = [similarities(gram(x[part]), gram((x + noise)[part]), draws=100, seed=0)[0] for part in parts]
    mean = sum(one.cka for one in found) / len(found)
    assert sum(one.low <= mean <= one.high for one in found) >= 51
    assert all(one.mean_of_halves > one.cka for one in found[:5])  # why the draws are put around the value


def test_models_that_tell_no_prompts_apart_have_no_similarity():
    assert torch.isnan(cka(gram(torch.ones(5, 1, 3)), gram(draw(5, 3, 8)[:, :1]))).all()
