"""A group's prompt computed once in training: the losses and gradients of separate rollouts, from fewer tokens."""

from dataclasses import replace

import numpy as np
import pytest
from ranks import run_ranks
from tiny.gradients import close, whole_gradients
from tiny.models import SPECS
from tiny.policies import open_policy
from tiny.rollouts import random_groups, rollout

from prism_mcore.rl.packing import Sample, micro_batches, pack, samples_of, unit_length, units
from prism_mcore.rl.settings import PolicySettings

SETTINGS = PolicySettings(kl_coefficient=0.0)


def test_a_micro_batch_by_hand():
    first = Sample(3, rollout([7, 9], logprobs=[-0.3, -0.02], version=4), 1.5, 0.25)
    second = Sample(4, rollout([1], logprobs=[-2.0], version=3), -1.0, 0.5)
    other = Sample(8, rollout([2, 3], prompt=[4], group=1), 0.5, 1.0)
    batch = pack([first, second, other], version=4, temperature=1.0, multiple=4, share=True)
    assert batch.tokens.tolist() == [[5, 4, 2, 0, 0, 6, 7, 6]]
    assert batch.labels.tolist() == [[6, 2, 3, 0, 0, 7, 9, 1]]
    assert batch.loss_mask.int().tolist() == [[0, 1, 1, 0, 0, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 0, 1, 0, 1, 1, 2, 1]]
    assert batch.cu_seqlens.tolist() == [0, 1, 3, 5, 7, 8] and batch.max_seqlen == 3
    assert batch.parents.tolist() == [-1, -1, -1, 0, 0]
    assert batch.rollout_ids.tolist() == [-1, 8, -1, 3, 4]
    assert batch.weights.tolist() == [[0, 1, 1, 0, 0, 0.25, 0.25, 0.5]]
    assert batch.on_policy.int().tolist() == [[1, 0, 0, 1, 1, 1, 1, 0]]
    np.testing.assert_allclose(batch.sampler_logprobs, [[0, -1, -1, 0, 0, -0.3, -0.02, -2.0]], rtol=1e-6)


def test_prompts_of_one_token_and_samples_alone_are_whole_documents():
    alone, short = rollout([7, 9]), [rollout([1], prompt=[4], group=1), rollout([2], prompt=[4], group=1)]
    samples = [Sample(i, one, 1.0, 1.0) for i, one in enumerate([alone, *short])]
    assert pack(samples, version=0, temperature=1.0, share=True).parents is None


def test_units_fit_the_budget_and_keep_every_sample_once():
    samples = samples_of(random_groups(61, groups=5, samples=7), SETTINGS)
    for budget in (12, 24, 1000):
        made = units(samples, 1, budget)
        assert [s.id for unit in made for s in unit] == [s.id for s in samples]
        assert all(unit_length(unit) <= budget for unit in made)
        assert all(len({s.rollout.group for s in unit}) == 1 for unit in made)
    assert len(units(samples, 1, 1000)) < len(units(samples, 1, 12))


def gradients_of(groups, spec, share, budget, longest_prompt):
    from prism_mcore.rl.step import policy_backward

    chunks, optimizer = open_policy(groups, spec)
    samples = samples_of(groups_with_prompts(SPECS[spec].vocab_size, longest_prompt), SETTINGS)
    made = units(samples, groups.dp_size, budget) if share else [(s,) for s in samples]
    mine = micro_batches(list(map(unit_length, made)), groups.dp_size, budget)[groups.dp_rank] or [[]]
    batches = [
        pack(
            [s for i in sorted(places) for s in made[i]],
            version=0,
            temperature=1.0,
            multiple=groups.tp_size,
            share=share,
        )
        for places in mine
    ]
    assert any(batch.parents is not None for batch in batches) == share
    stats = policy_backward(chunks, optimizer, batches, SETTINGS, groups)
    tokens = sum(batch.tokens.numel() for batch in batches)
    return whole_gradients([chunk.module for chunk in chunks], chunks, groups), stats, tokens


def groups_with_prompts(vocab_size, longest):
    """Three groups whose prompts are of 2, `longest` // 2 and `longest` tokens; convolutions reach over their ends."""
    random = np.random.default_rng(5)
    prompts = [tuple(random.integers(0, vocab_size, n).tolist()) for n in (2, longest // 2, longest)]
    return [
        replace(group, rollouts=tuple(replace(one, prompt_tokens=prompt) for one in group.rollouts))
        for group, prompt in zip(random_groups(vocab_size), prompts, strict=True)
    ]


@pytest.mark.parametrize("spec", SPECS)
def test_losses_and_gradients_are_those_of_separate_rollouts(spec):
    ((want, stats, tokens),) = run_ranks(1, gradients_of, spec, False, 1000, 70)
    for ranks, budget, layout in [
        (1, 1000, {}),
        (1, 90, {}),
        (2, 1000, {}),
        (2, 1000, {"tp": 2, "sequence_parallel": True}),
    ]:
        for got, seen, fewer in run_ranks(ranks, gradients_of, spec, True, budget, 70, **layout):
            assert all(close(got[name], want[name], 1e-5) for name in want)
            assert seen.loss == pytest.approx(stats.loss, abs=2e-7)  # a sum of terms of size 1 that cancel
            assert seen.gap_mean == pytest.approx(stats.gap_mean, rel=1e-6)
            assert seen.means == pytest.approx(stats.means, rel=1e-6)
            assert (seen.gap.rollout, seen.gap.position) == (stats.gap.rollout, stats.gap.position)
            assert fewer < tokens * (0.4 if (ranks, budget) == (1, 1000) else 0.9)
