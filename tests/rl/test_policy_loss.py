"""Each algorithm switch against an example computed by hand."""

import math
import typing
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny.rollouts import group_of, rollout

from prism_mcore.rl.advantage import ADVANTAGES, advantages, has_spread
from prism_mcore.rl.aggregation import AGGREGATIONS
from prism_mcore.rl.packing import pack, samples_of
from prism_mcore.rl.policy_loss import CLIPS, CORRECTIONS, KL, RATIOS, policy_loss
from prism_mcore.rl.settings import PolicySettings
from prism_mcore.rl.shaping import overlong_penalty, with_kl, with_overlong_penalty


@pytest.mark.parametrize(
    ("field", "table"),
    [
        ("advantage", ADVANTAGES),
        ("aggregation", AGGREGATIONS),
        ("ratio", RATIOS),
        ("clip", CLIPS),
        ("correction", CORRECTIONS),
        ("kl", KL),
    ],
)
def test_every_setting_has_its_function(field, table):
    assert set(typing.get_args(PolicySettings.model_fields[field].annotation)) == set(table)


def group_advantages(group, kind, eps):
    return advantages([group], kind, eps)[0]


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


def one_sample(settings, *, now, sampled, advantage, version=0, reference=None, entropy=0.0):
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
    loss, terms = policy_loss(logprobs, torch.full_like(logprobs, entropy).detach(), batch, settings)
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
    assert terms.ratio[-3:].tolist() == [1.0] * 3 and not terms.means["clip/high"].any()
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
    assert terms.means["clip/high"].sum() == (1 if inside else 2) and not terms.gap[-4:].any()
    loss, gradient, terms = one_sample(settings, now=now, sampled=sampled, advantage=-1.0, version=3)
    assert loss == pytest.approx((1.25 + 1.5 + 0.8 + 1.0) / 4)  # the minimum keeps what makes the loss worse
    assert gradient == pytest.approx([1.25 / 4, 1.5 / 4, 0.0, 1.0 / 4])
    assert terms.means["clip/low"].sum() == 1 and not terms.means["clip/high"].any()


@pytest.mark.parametrize(
    ("kind", "value", "slope"),
    [("k1", 0.5, 1.0), ("k2", 0.125, 0.5), ("k3", math.exp(-0.5) - 0.5, 1 - math.exp(-0.5))],
)
def test_kl_estimators(kind, value, slope):
    settings = PolicySettings(kl=kind, kl_coefficient=0.1)
    loss, gradient, terms = one_sample(settings, now=[-1.0], sampled=[-1.0], advantage=0.0, reference=[-1.5])
    assert loss == pytest.approx(0.1 * value) and gradient == pytest.approx([0.1 * slope])
    assert terms.means["kl"][-1].item() == pytest.approx(value)


def test_an_impossible_token_of_the_reference_gives_a_finite_loss():
    loss, gradient, _ = one_sample(PolicySettings(), now=[-200.0], sampled=[-200.0], advantage=0.0, reference=[-1.0])
    assert math.isfinite(loss) and math.isfinite(gradient[0])


def test_rloo_and_reinforce_pp():
    group = group_of(*(rollout([9], reward) for reward in (1.0, 0.0, 0.0, 0.0)))
    assert group_advantages(group, "rloo", 0.0) == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    solved = group_of(rollout([9], 1.0), rollout([9], 1.0))
    # six rewards 1 0 0 0 1 1: mean 1/2, std 1/2; a group without spread is better than the others all the same
    assert np.concatenate(advantages([group, solved], "reinforce_pp", 0.0)) == pytest.approx([1, -1, -1, -1, 1, 1])
    # less the group's mean: 3/4, three times -1/4, 0, 0, whose std is sqrt(1/8)
    found = np.concatenate(advantages([group, solved], "reinforce_pp_baseline", 0.0))
    assert found == pytest.approx(np.array([0.75, -0.25, -0.25, -0.25, 0, 0]) / math.sqrt(1 / 8))
    invalid = group_of(rollout([9], 1.0), rollout([9], 7.0, valid=False), rollout([9], 0.0))
    assert advantages([invalid], "reinforce_pp", 0.0)[0].tolist() == [1.0, 0.0, -1.0]
    assert advantages([group_of(rollout([9], 1.0))], "reinforce_pp", 0.0)[0].tolist() == [0.0]
    assert advantages([], "reinforce_pp", 0.0) == []


def test_the_constant_denominator_knows_no_length():
    assert AGGREGATIONS["constant"]([[2, 6], [4, 0]], 10) == [[1 / 30, 1 / 30], [1 / 30, 0.0]]


def test_a_sequence_has_one_ratio_and_its_gradient_reaches_every_token():
    log = math.log
    settings = PolicySettings(**NO_KL, ratio="sequence", clip_low=0.5, clip_high=9.0)
    sampled, now = [log(0.1)] * 2, [log(0.2), log(0.45)]  # ratios 2 and 4.5, geometric mean 3
    loss, gradient, terms = one_sample(settings, now=now, sampled=sampled, advantage=1.0, version=3)
    assert loss == pytest.approx(-3.0) and terms.ratio[-2:].tolist() == pytest.approx([3.0, 3.0])
    assert gradient == pytest.approx([-3.0 / 2] * 2)
    _, gradient, _ = one_sample(
        PolicySettings(**NO_KL, ratio="sequence", clip_high=1.9), now=now, sampled=sampled, advantage=1.0, version=3
    )
    assert gradient == [0.0, 0.0]  # 3 is above 1 + 1.9


def test_cispo_keeps_the_gradient_of_a_clipped_token():
    log = math.log
    settings = PolicySettings(**NO_KL, clip="cispo", clip_low=1.0, clip_high=1.0)
    sampled, now = [log(0.1)] * 3, [log(0.05), log(0.1), log(0.4)]
    _, gradient, _ = one_sample(settings, now=now, sampled=sampled, advantage=3.0, version=3)
    assert gradient == pytest.approx([-3.0 * r / 3 for r in (0.5, 1.0, 2.0)])
    _, gradient, _ = one_sample(
        PolicySettings(**NO_KL, clip="none"), now=now, sampled=sampled, advantage=3.0, version=3
    )
    assert gradient == pytest.approx([-3.0 * r / 3 for r in (0.5, 1.0, 4.0)])


def test_dual_clip_bounds_a_bad_tokens_part():
    log = math.log
    settings = PolicySettings(**NO_KL, dual_clip=3.0)
    sampled, now = [log(0.1)] * 2, [log(0.2), log(0.5)]  # ratios 2 and 5
    loss, gradient, _ = one_sample(settings, now=now, sampled=sampled, advantage=-1.0, version=3)
    assert loss == pytest.approx((2.0 + 3.0) / 2) and gradient == pytest.approx([2.0 / 2, 0.0])


def test_corrections_mask_tokens_or_responses_on_which_sampler_and_training_disagree():
    log = math.log
    sampled, now = [log(0.1)] * 3, [log(0.04), log(0.2), log(0.6)]  # 0.4, 2, 6: geometric mean 1.687
    _, gradient, terms = one_sample(
        PolicySettings(**NO_KL, correction="icepop"), now=now, sampled=sampled, advantage=3.0
    )
    assert gradient == pytest.approx([0.0, -2.0, 0.0]) and terms.means["importance/capped"][-3:].sum() == 2
    sequence = {"correction": "sequence", "tis_cap": 3.0}
    _, gradient, _ = one_sample(PolicySettings(**NO_KL, **sequence), now=now, sampled=sampled, advantage=3.0)
    assert gradient == pytest.approx([-0.4, -2.0, -3.0])
    _, gradient, _ = one_sample(
        PolicySettings(**NO_KL, **sequence, mask_high=1.5), now=now, sampled=sampled, advantage=3.0
    )
    assert gradient == [0.0] * 3


def test_a_response_is_masked_whole_and_judged_by_the_tokens_that_its_weights_sampled():
    settings = PolicySettings(**NO_KL, correction="sequence", mask_high=2.0, clip_high=9.0)
    group = group_of(rollout([9, 9], 1.0, logprobs=[-1.0, -1.0]), rollout([3], 0.0))
    for step, masked in (
        (1.0, True),
        (0.5, False),
    ):  # e is above 2, its root is not; with the stale token's 1 both pass
        one = samples_of([group], settings)[0]
        rollout_ = replace(one.rollout, versions=np.array([0, 1], np.int32))
        batch = pack([replace(one, rollout=rollout_, advantage=1.0)], version=1, temperature=1.0)
        logprobs = torch.tensor([-7.0, -1.0, -1.0 + step], requires_grad=True)
        loss, _ = policy_loss(logprobs, torch.zeros(3), batch, settings)
        loss.backward()
        assert (not logprobs.grad.any()) == masked


def test_the_entropy_bonus_is_the_entropys_gradient_on_average():
    """Over the four tokens of a softmax: sum_a pi(a) (log pi(a) + H) grad log pi(a) is minus the gradient of H."""
    logits = torch.tensor([0.3, -1.0, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(0)
    entropy = -(logprobs.exp() * logprobs).sum()
    (want,) = torch.autograd.grad(-0.5 * entropy, logits, retain_graph=True)
    slopes = [
        one_sample(
            PolicySettings(**NO_KL, entropy_coefficient=0.5),
            now=[float(x)],
            sampled=[float(x)],
            advantage=0.0,
            entropy=float(entropy.detach()),
        )[1][0]
        for x in logprobs.detach()
    ]
    estimate = sum(
        float(p) * slope * g
        for p, slope, g in zip(logprobs.detach().exp(), slopes, grads_of(logprobs, logits), strict=True)
    )
    torch.testing.assert_close(estimate, want, rtol=1e-5, atol=1e-7)


def grads_of(logprobs, logits):
    return [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in logprobs]


def cut(finish, reward):
    return replace(rollout([9, 9, 9, 9], reward), finish=finish)


def test_overlong_responses_are_left_out_of_the_loss_or_punished():
    group = group_of(cut("length", 0.0), cut("stop", 1.0), cut("context", 0.0), cut("stop", 0.0))
    masked = samples_of([group], PolicySettings(overlong="mask", advantage="dr_grpo"))
    assert [(s.id, s.advantage, s.weight) for s in masked] == [(1, 0.75, 1 / 8), (3, -0.25, 1 / 8)]
    assert [overlong_penalty(n, 100, 20) for n in (50, 80, 90, 100)] == [0.0, 0.0, -0.5, -1.0]
    (soft,) = with_overlong_penalty([group], 5, 2)
    assert [r.reward for r in soft.rollouts] == [-0.5, 0.5, -0.5, -0.5]


def test_the_kl_is_taken_off_the_reward():
    group = group_of(rollout([9], 1.0), rollout([9], 0.0, valid=False), rollout([9], 0.0))
    (with_part,) = with_kl([group], [2.0, 5.0, -1.0], 0.1)
    assert [r.reward for r in with_part.rollouts] == pytest.approx([0.8, 0.0, 0.1])
