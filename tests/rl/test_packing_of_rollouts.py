"""Rollouts to micro-batches: every token where it belongs, the same rule on every rank."""

import numpy as np
import torch
from tiny.rollouts import random_groups, rollout

from prism_mcore.rl.packing import Sample, micro_batches, pack, samples_of
from prism_mcore.rl.settings import PolicySettings


def test_a_micro_batch_by_hand():
    first = Sample(3, rollout([7, 9], logprobs=[-0.3, -0.02], version=4), 1.5, 0.25)
    second = Sample(8, rollout([1], prompt=[4], logprobs=[-2.0], version=3), -1.0, 0.5)
    batch = pack([first, second], version=4, temperature=1.0, multiple=3)
    assert batch.tokens.tolist() == [[5, 6, 7, 4, 0, 0]]
    assert batch.labels.tolist() == [[6, 7, 9, 1, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, True, True, True, False, False]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.seq_idx.tolist() == [[0, 0, 0, 1, 2, 2]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6] and batch.max_seqlen == 3 and batch.num_tokens == 3
    assert batch.advantages.tolist() == [[0, 1.5, 1.5, -1, 0, 0]]
    assert batch.weights.tolist() == [[0, 0.25, 0.25, 0.5, 0, 0]]
    assert torch.equal(batch.sampler_logprobs, torch.tensor([[0, -0.3, -0.02, -2.0, 0, 0]]))
    assert batch.on_policy.tolist() == [[True, True, True, False, True, True]]
    assert batch.rollout_ids.tolist() == [3, 8, -1]


def test_a_rank_without_rollouts_gets_a_filler_that_weighs_nothing():
    batch = pack([], version=0, temperature=1.0, multiple=2)
    assert batch.tokens.shape == (1, 2) and batch.num_tokens == 0 and not batch.weights.any()


def test_documents_are_dealt_once_within_the_budget_and_evenly():
    random = np.random.default_rng(1)
    for ranks in (1, 2, 3, 8):
        lengths = random.integers(1, 100, 57).tolist()
        dealt = micro_batches(lengths, ranks, 128)
        assert sorted(i for rank in dealt for batch in rank for i in batch) == list(range(57))
        assert all(sum(lengths[i] for i in batch) <= 128 for rank in dealt for batch in rank)
        totals = [sum(lengths[i] for batch in rank for i in batch) for rank in dealt]
        assert max(totals) - min(totals) <= 100
    assert micro_batches([5, 9, 5], 2, 8) == [[[1]], [[0], [2]]]  # equals in order; one above the budget is alone


def test_empty_and_invalid_responses_are_not_in_the_loss():
    (group,) = random_groups(50, groups=1, samples=4)
    spoilt = [
        rollout([], 1.0),
        rollout([3], 0.0, valid=False),
        rollout([4, 5], 1.0),
        rollout([6], 0.0),
    ]
    samples = samples_of([type(group)(group.prompt, tuple(spoilt))], PolicySettings())
    assert [s.id for s in samples] == [2, 3]
    assert [s.weight for s in samples] == [1 / 3, 1 / 3]
    assert samples[1].advantage < 0 < samples[0].advantage  # the empty one still counts in mean and std
