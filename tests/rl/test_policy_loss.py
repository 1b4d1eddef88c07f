"""Each algorithm switch against an example computed by hand."""

import math
import typing

import numpy as np
import pytest
import torch
from tiny.rollouts import group_of, rollout

from prism_mcore.rl.advantage import ADVANTAGES, group_advantages, has_spread
from prism_mcore.rl.aggregation import AGGREGATIONS
from prism_mcore.rl.packing import pack, samples_of
from prism_mcore.rl.policy_loss import KL, policy_loss
from prism_mcore.rl.settings import PolicySettings


@pytest.mark.parametrize(("field", "table"), [("advantage", ADVANTAGES), ("aggregation", AGGREGATIONS), ("kl", KL)])
def test_every_setting_has_its_function(field, table):
    assert set(typing.get_args(PolicySettings.model_fields[field].annotation)) == set(table)


def test_grpo_and_dr_grpo():
    group = group_of(*(rollout([9], reward) for reward in (1.0, 0.0, 0.0, 0.0)))
    root = math.sqrt(3)
    assert group_advantages(group, "grpo", 0.0) == pytest.approx([root, -1 / root, -1 / root, -1 / root])
    assert group_advantages(group, "grpo", math.sqrt(3) / 4)[0] == pytest.approx(root / 2)  # std is sqrt(3)/4, too
    assert group_advantages(group, "dr_grpo", 0.0) == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_a_masked_sample_leaves_its_groups_mean_and_std():
    masked = group_of(rollout([9], 1.0), rollout([9], 50.0, valid=False), rollout([9], 0.0))
    assert group_advantages(masked, "grpo", 0.0).tolist() == [1.0, 0.0, -1.0]
    alone = group_of(rollout([9], 1.0), rollout([9], 0.0, valid=False))
    assert not has_spread(alone) and group_advantages(alone, "grpo", 0.0).tolist() == [0.0, 0.0]


def test_a_group_without_spread_has_no_advantage_even_where_its_mean_rounds():
    group = group_of(*(rollout([9], 0.1) for _ in range(3)))
    assert np.mean([0.1] * 3) != 0.1
    assert group_advantages(group, "grpo", 0.0).tolist() == [0.0] * 3


def test_aggregations():
    lengths = [[2, 6], [4, 0]]  # two groups; the last sample is not in the loss
    assert AGGREGATIONS["group_total"](lengths) == [[1 / 16, 1 / 16], [1 / 8, 0.0]]
    assert AGGREGATIONS["token_mean"](lengths) == [[1 / 12, 1 / 12], [1 / 12, 0.0]]
    assert AGGREGATIONS["sequence_mean"](lengths) == [[1 / 6, 1 / 18], [1 / 12, 0.0]]
    assert AGGREGATIONS["group_total"]([[0, 0], [4, 0]]) == [[0.0, 0.0], [1 / 4, 0.0]]


def spread_and_none():
    return [
        group_of(rollout([9, 2], 1.0), rollout([9, 9, 9, 9, 9, 2], 0.0), index=0),
        group_of(rollout([9, 2], 1.0), rollout([9, 2], 1.0), index=1),
    ]


def test_groups_without_spread_count_in_the_denominator_or_are_dropped():
    kept = samples_of(spread_and_none(), PolicySettings())
    assert [(s.id, s.advantage, s.weight) for s in kept] == [
        (0, pytest.approx(1.0), 1 / 16),
        (1, pytest.approx(-1.0), 1 / 16),
        (2, 0.0, 1 / 8),
        (3, 0.0, 1 / 8),
    ]
    dropped = samples_of(spread_and_none(), PolicySettings(drop_zero_spread=True))
    assert [(s.id, s.weight) for s in dropped] == [(0, 1 / 8), (1, 1 / 8)]


def one_sample(settings, *, now, sampled, advantage, version=0, reference=None):
    """(loss, gradient at the response's tokens, terms) of a single response with weights 1/n."""
    group = group_of(rollout([9] * len(now), 1.0, logprobs=sampled, version=0), rollout([3], 0.0))
    sample = samples_of([group], settings)[0]
    sample = type(sample)(0, sample.rollout, advantage, 1 / len(now))
    batch = pack([sample], version=version, temperature=1.0)
    prompt = len(batch.loss_mask[0]) - len(now)
    logprobs = torch.tensor([-7.0] * prompt + list(now), requires_grad=True)
    if reference is not None:
        batch = type(batch)(
            **{**batch.__dict__, "reference_logprobs": torch.tensor([[-7.0] * prompt + list(reference)])}
        )
    loss, terms = policy_loss(logprobs, batch, settings)
    loss.backward()
    assert not logprobs.grad[:prompt].any()
    return loss.item(), logprobs.grad[prompt:].tolist(), terms


NO_KL = {"kl_coefficient": 0.0}


def test_on_policy_the_gradient_is_the_policy_gradient_times_the_truncated_correction():
    log = math.log
    now, sampled = [log(0.3), log(0.5), log(0.2)], [log(0.2), log(0.1), log(0.4)]
    # pi / sampler is 1.5, 5 (cut to 2) and 0.5; the ratio is 1 everywhere
    loss, gradient, terms = one_sample(PolicySettings(**NO_KL), now=now, sampled=sampled, advantage=2.0)
    assert loss == pytest.approx(-2.0 * (1.5 + 2.0 + 0.5) / 3)
    assert gradient == pytest.approx([-2.0 * c / 3 for c in (1.5, 2.0, 0.5)])
    assert terms.ratio[-3:].tolist() == [1.0] * 3 and not terms.clipped_high.any()
    assert terms.gap[-3:].tolist() == pytest.approx([log(1.5), log(5), log(2)])
    _, gradient, _ = one_sample(PolicySettings(**NO_KL, tis_cap=0), now=now, sampled=sampled, advantage=2.0)
    assert gradient == pytest.approx([-2.0 / 3] * 3)


@pytest.mark.parametrize(("clip_high", "largest"), [(0.2, 1.2), (0.28, 1.28)])
def test_off_policy_the_ratio_to_the_sampler_is_clipped(clip_high, largest):
    log = math.log
    settings = PolicySettings(**NO_KL, clip_high=clip_high)
    sampled = [log(0.1)] * 4
    now = [log(0.1 * r) for r in (1.25, 1.5, 0.5, 1.0)]
    loss, gradient, terms = one_sample(settings, now=now, sampled=sampled, advantage=1.0, version=3)
    assert loss == pytest.approx(-(min(1.25, largest) + largest + 0.5 + 1.0) / 4)
    inside = clip_high == 0.28
    assert gradient == pytest.approx([-1.25 / 4 if inside else 0.0, 0.0, -0.5 / 4, -1.0 / 4])
    assert terms.clipped_high.sum() == (1 if inside else 2) and not terms.gap[-4:].any()
    loss, gradient, terms = one_sample(settings, now=now, sampled=sampled, advantage=-1.0, version=3)
    assert loss == pytest.approx((1.25 + 1.5 + 0.8 + 1.0) / 4)  # the minimum keeps what makes the loss worse
    assert gradient == pytest.approx([1.25 / 4, 1.5 / 4, 0.0, 1.0 / 4])
    assert terms.clipped_low.sum() == 1 and not terms.clipped_high.any()


@pytest.mark.parametrize(
    ("kind", "value", "slope"),
    [("k1", 0.5, 1.0), ("k2", 0.125, 0.5), ("k3", math.exp(-0.5) - 0.5, 1 - math.exp(-0.5))],
)
def test_kl_estimators(kind, value, slope):
    settings = PolicySettings(kl=kind, kl_coefficient=0.1)
    loss, gradient, terms = one_sample(settings, now=[-1.0], sampled=[-1.0], advantage=0.0, reference=[-1.5])
    assert loss == pytest.approx(0.1 * value) and gradient == pytest.approx([0.1 * slope])
    assert terms.kl[-1].item() == pytest.approx(value)


def test_an_impossible_token_of_the_reference_gives_a_finite_loss():
    loss, gradient, _ = one_sample(PolicySettings(), now=[-200.0], sampled=[-200.0], advantage=0.0, reference=[-1.0])
    assert math.isfinite(loss) and math.isfinite(gradient[0])
