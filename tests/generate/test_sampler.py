"""The sampler: the right distribution, the same tokens for any cut of the vocabulary, transformers' top-k and top-p."""

import numpy as np
import pytest
import torch
import transformers
from ranks import run_ranks

from prism_mcore.generate.sampler import TILE, Sampler, Vocabulary, uniforms

SIZE = 300  # two tiles and a part of one


def whole(size=SIZE):
    return Vocabulary(size, 0, size, -(-size // TILE), None)


def keys(count, seed=3):
    return np.array([(seed, 1, 2, sample) for sample in range(count)], np.uint64)


def test_uniform_numbers_are_philox():
    """The known answer of Random123 (kat_vectors, philox4x32 10) for counters and keys of zeros, and of ones."""
    first, second = (0x6627E8D5, 0xE169C58D), (0x408F276D, 0x41C83B0E)
    want = [(((a >> 6) << 26 | b >> 6) + 0.5) / 2**52 for a, b in (first, second)]
    ones = 2**32 - 1
    got = uniforms(np.array([(0, 0, 0, 0), (2**64 - 1, ones, ones, ones)], np.uint64), np.array([0, ones]))
    assert got.tolist() == want


def test_uniform_numbers_are_uniform_and_differ_in_every_part_of_the_key():
    drawn = uniforms(keys(1).repeat(20000, 0), np.arange(20000))
    assert drawn.min() > 0 and drawn.max() < 1
    counts = np.histogram(drawn, 50, (0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 86  # chi-square of 49 degrees of freedom: 0.1%
    base = np.array([5, 6, 7, 8], np.uint64)
    others = [base + np.eye(4, dtype=np.uint64)[i] for i in range(4)]
    values = uniforms(np.stack([base, base, *others]), np.array([0, 1, 0, 0, 0, 0]))
    assert len(set(values.tolist())) == 6


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.7}, {"top_k": 40, "top_p": 0.8}], ids=str)
def test_tokens_follow_the_distribution(options):
    """Chi-square at 0.1% over 20,000 draws from one row; what is cut off is never drawn."""
    count = 20000
    logits = torch.randn(1, SIZE, generator=torch.Generator().manual_seed(0)) * 2
    uniform = torch.from_numpy(uniforms(keys(count), np.zeros(count)))
    tokens, logprobs = Sampler(whole(), **options)(logits.expand(count, -1), uniform)
    assert torch.allclose(logprobs, logits.log_softmax(-1)[0, tokens], atol=1e-5)
    expected = filtered(logits, **options).softmax(-1)[0].double() * count
    observed = torch.bincount(tokens, minlength=SIZE)
    assert (observed[expected == 0] == 0).all()
    often = expected >= 5
    observed = torch.cat([observed[often], observed[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert statistic < freedom + 3.1 * (2 * freedom) ** 0.5 + 7  # Wilson-Hilferty: above the 0.1% point


def filtered(logits, top_k=0, top_p=1.0):
    """transformers' warpers, as its `generate` applies them."""
    if top_k:
        logits = transformers.TopKLogitsWarper(top_k)(None, logits)
    return transformers.TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits


@pytest.mark.parametrize("size", [61, 2000])
def test_top_k_and_top_p_keep_what_transformers_keeps(size):
    """Flat rows need more than the 512 likeliest, which are looked at first."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(24, size, generator=generator) * torch.linspace(0.1, 5, 24)[:, None]
    for top_k, top_p in ((0, 0.9), (0, 0.05), (10, 1.0), (30, 0.9), (size, 0.5), (1, 0.5)):
        sampler = Sampler(whole(size), top_k=top_k, top_p=top_p)
        kept = logits >= sampler._threshold(logits, logits.amax(1))[:, None]
        assert torch.equal(kept, filtered(logits, min(top_k, size), top_p) > -torch.inf), (top_k, top_p)


def test_the_ends_of_the_distribution():
    """A uniform number next to 0 or 1 takes the first or last token that has a probability, never one without."""
    logits = torch.full((2, SIZE), -torch.inf)
    uniform = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    logits[:, 5] = 0.0
    for last, token in ((-60.0, 5), (-30.0, 140)):  # exp(-60) is less than 2**-53, exp(-30) is more
        logits[:, 140] = last
        tokens, logprobs = Sampler(whole())(logits, uniform)
        assert tokens.tolist() == [5, token]
        assert logprobs.tolist() == pytest.approx([0, last if token == 140 else 0], abs=1e-5)


def test_greedy_takes_the_first_of_equals():
    logits = torch.zeros(3, SIZE)
    logits[1, 200] = logits[1, 130] = 4.0
    tokens, logprobs = Sampler(whole(), greedy=True)(logits, torch.full((3,), 0.9, dtype=torch.float64))
    assert tokens.tolist() == [0, 130, 0]
    assert torch.allclose(logprobs, logits.log_softmax(-1)[range(3), tokens], atol=1e-6)


def cut(groups, logits, uniform, size, options):
    padded = -(-size // groups.tp_size) * groups.tp_size
    here = Vocabulary.of(size, padded, groups)
    sampler = Sampler(here, **options)
    mine = logits[:, here.first : here.first + here.rows].clone()
    return sampler(mine, uniform)


@pytest.mark.parametrize("size", [61, 3, 300])
@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"top_k": 2, "top_p": 0.9}, {"top_p": 0.6}], ids=str)
def test_ranks_that_share_the_vocabulary_draw_what_one_draws(size, options):
    """61 of 62 and 3 of 4 rows: the last rank has less, or one token only."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(64, size, generator=generator) * 3
    uniform = torch.rand(64, dtype=torch.float64, generator=generator)
    ((want, want_logprobs),) = run_ranks(1, cut, logits, uniform, size, options)
    for tokens, logprobs in run_ranks(2, cut, logits, uniform, size, options, tp=2):
        assert torch.equal(tokens, want)
        assert torch.allclose(logprobs, want_logprobs, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.7}], ids=str)
def test_deterministic_mode_draws_the_same_without_cumsum(options, monkeypatch):
    """torch has no deterministic cumsum of floats on a GPU: there `run.deterministic` would end at the first token."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(200, SIZE, generator=generator) * 3
    uniform = torch.rand(200, dtype=torch.float64, generator=generator)
    sampler = Sampler(whole(), **options)
    want = sampler(logits, uniform)[0]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    monkeypatch.setattr(torch.Tensor, "cumsum", None, raising=False)
    assert torch.equal(sampler(logits, uniform)[0], want)
