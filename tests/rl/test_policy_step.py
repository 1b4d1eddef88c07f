"""One update: the gradient is that of the formula, in every layout and split; what it reports is true."""

import math

import pytest
import torch
from ranks import run_ranks
from tiny.gradients import close, whole_gradients
from tiny.models import SPECS
from tiny.policies import batches_of, open_policy
from tiny.rollouts import random_groups

from prism_mcore.rl.packing import samples_of
from prism_mcore.rl.settings import PolicySettings


def gradients_of(groups, spec, settings, budget, version=0):
    """Gradients of the whole model, and the stats."""
    from prism_mcore.rl.step import policy_backward

    chunks, optimizer = open_policy(groups, spec)
    batches = batches_of(groups, spec, settings, budget=budget, first=version)
    stats = policy_backward(chunks, optimizer, batches, settings, groups)
    return whole_gradients([chunk.module for chunk in chunks], chunks, groups), stats, len(batches)


# Group weights, importance weights, the clip and the KL term (to the sampler's own values, for want of a reference).
SETTINGS = {
    "on-policy": (PolicySettings(kl_coefficient=0.0), 0),
    "off-policy": (PolicySettings(kl_coefficient=0.0, aggregation="token_mean", clip_high=0.3), 5),
    "sequences": (PolicySettings(kl_coefficient=0.0, ratio="sequence", clip_high=0.3, entropy_coefficient=0.1), 5),
    "masks": (PolicySettings(kl_coefficient=0.0, correction="sequence", mask_high=1.5, clip="cispo"), 0),
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("spec", ["dense", "granite hybrid"])
def test_the_gradient_does_not_depend_on_micro_batches_or_layout(spec, case):
    settings, version = SETTINGS[case]
    ((want, stats, one),) = run_ranks(1, gradients_of, spec, settings, 1000, version)
    assert one == 1 and stats.tokens > 30
    for ranks, budget, layout in [
        (1, 16, {}),
        (2, 16, {}),
        (4, 1000, {}),
        (2, 24, {"tp": 2, "sequence_parallel": True}),
    ]:
        for got, seen, _ in run_ranks(ranks, gradients_of, spec, settings, budget, version, **layout):
            assert all(close(got[name], want[name], 2e-5) for name in want)
            assert seen.loss == pytest.approx(stats.loss, rel=1e-5)
            assert seen.grad_norm == pytest.approx(stats.grad_norm, rel=1e-5)
            assert seen.gap.rollout == stats.gap.rollout and seen.gap.position == stats.gap.position
            assert seen.gap.size == pytest.approx(stats.gap.size, rel=1e-5)
            assert seen.means == pytest.approx(stats.means, rel=1e-5) and seen.tokens == stats.tokens
            assert seen.ratio_max == pytest.approx(stats.ratio_max, rel=1e-5)


def plainly(groups, settings):
    """The same loss one rollout at a time, written down from the formula, by autograd through full logits."""
    from prism_mcore.rl.step import policy_backward

    chunks, optimizer = open_policy(groups, "dense")
    model, spec = chunks[0].module, SPECS["dense"]
    samples = samples_of(random_groups(spec.vocab_size), settings)
    stats = policy_backward(chunks, optimizer, batches_of(groups, "dense", settings), settings, groups)
    got = {name: tensor.main_grad.clone() for name, tensor, _ in model.table()}
    total, gaps, entropies = 0.0, [], []
    for chunk in chunks:
        chunk.zero_grad_buffer()
    hidden = {}
    model.final_norm.register_forward_hook(lambda module, inputs, output: hidden.update(x=output[0]))  # and the sum
    for sample in samples:
        rollout = sample.rollout
        batch = batches_for(sample)
        model(batch, temperature=1.0)
        logits = hidden["x"].squeeze(1) @ model.output.weight.t() / spec.logits_divisor
        logprobs = logits[:, : spec.vocab_size].log_softmax(-1)[-len(rollout.tokens) :]
        entropies += (-(logprobs.exp() * logprobs).sum(-1)).tolist()
        now = logprobs.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        sampled = torch.from_numpy(rollout.logprobs.copy())
        gaps += [(gap, sample.id) for gap in (now.detach() - sampled).abs().tolist()]
        importance = (now.detach() - sampled).exp().clamp(max=2.0)
        loss = -(importance * sample.advantage * sample.weight * (now - now.detach()).exp()).sum()
        loss.backward()
        total += loss.item()
    for name, tensor, _ in model.table():
        assert close(got[name], tensor.main_grad + (0 if tensor.grad is None else tensor.grad), 2e-5), name
    assert stats.loss == pytest.approx(total, rel=1e-5)
    assert stats.means["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert stats.gap_mean == pytest.approx(sum(gap for gap, _ in gaps) / len(gaps), rel=1e-5)
    assert (stats.gap.size, stats.gap.rollout) == (pytest.approx(max(gaps)[0], rel=1e-5), max(gaps)[1])


def batches_for(sample):
    from prism_mcore.rl.packing import pack

    return pack([sample], version=0, temperature=1.0)


def test_the_gradient_is_that_of_the_formula():
    run_ranks(1, plainly, PolicySettings(kl_coefficient=0.0))


def without_values(groups, spec):
    """A micro-batch's forward pass, its loss and what is seen of it, on tensors without values."""
    from prism_mcore.model.build import build_chunks
    from prism_mcore.model.ops import Ops
    from prism_mcore.rl.packing import pack
    from prism_mcore.rl.policy_loss import policy_loss
    from prism_mcore.rl.step import _Seen
    from prism_mcore.train.step import to_device

    settings, device = PolicySettings(kl_coefficient=0.0), torch.device("meta")
    layers = [list(range(len(SPECS[spec].pattern)))]
    (model,) = build_chunks(
        SPECS[spec], layers, groups, Ops({}, torch.device("cpu")), dtype=torch.bfloat16, device=device
    )
    samples = samples_of(random_groups(SPECS[spec].vocab_size), settings)
    batch = to_device(pack(samples, version=0, temperature=1.0), device)
    logprobs, entropy = model(batch, temperature=1.0)
    loss, terms = policy_loss(logprobs, entropy, batch, settings)
    seen = _Seen.of(terms, batch)
    return {x.device.type for x in (loss, *seen.sums.values(), seen.largest)}


@pytest.mark.parametrize("spec", SPECS)
def test_the_cpu_waits_for_nothing_between_forward_and_backward(spec):
    """Tensors without values raise an error where one is asked for."""
    assert run_ranks(1, without_values, spec) == [{"meta"}]


def nothing_to_learn(groups):
    from prism_mcore.rl.packing import pack
    from prism_mcore.rl.step import policy_backward

    chunks, optimizer = open_policy(groups, "dense")
    batches = [pack([], version=0, temperature=1.0)]
    stats = policy_backward(chunks, optimizer, batches, PolicySettings(), groups)
    return stats.tokens, stats.loss, stats.grad_norm, stats.gap.rollout, math.isnan(stats.means["entropy"])


def test_an_update_without_samples_has_no_gradient():
    assert set(run_ranks(2, nothing_to_learn)) == {(0, 0.0, 0.0, -1, True)}


def at_temperature(groups):
    from prism_mcore.rl.packing import pack
    from prism_mcore.rl.step import score

    chunks, _ = open_policy(groups, "granite hybrid")
    samples = samples_of(random_groups(61), PolicySettings())
    plain, hot = (score(chunks, [pack(samples[:2], version=0, temperature=t)])[0] for t in (1.0, 1e9))
    return plain, hot


def test_scores_are_at_the_samplers_temperature_over_the_unpadded_vocabulary():
    for plain, hot in run_ranks(2, at_temperature, tp=2):
        torch.testing.assert_close(hot, torch.full_like(hot, -math.log(61)))
        assert not torch.allclose(plain, hot, atol=0.1)
