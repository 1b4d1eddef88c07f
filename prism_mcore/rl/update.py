"""A step's policy updates: its rollouts to micro-batches, scored under the reference, each part one optimizer step."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from prism_mcore import platform
from prism_mcore.agree import summed
from prism_mcore.batch import PolicyBatch, RolloutGroup
from prism_mcore.model.checks import FP8_MULTIPLE
from prism_mcore.rl import parity
from prism_mcore.rl.advantage import advantages
from prism_mcore.rl.packing import micro_batches, pack, samples_of, unit_length, units
from prism_mcore.rl.policy_loss import kl_estimate
from prism_mcore.rl.run import PolicyRun
from prism_mcore.rl.settings import PolicySettings, RLSettings
from prism_mcore.rl.shaping import with_kl, with_overlong_penalty
from prism_mcore.rl.step import PolicyStats, policy_backward, score
from prism_mcore.train.optimizer import gathered_parameters, update


def update_policy(run: PolicyRun, step: int, groups: Sequence[RolloutGroup], lr: float) -> list[PolicyStats]:
    """The step's updates; the stats of each that had anything to learn from."""
    clock, seen = run.rollouts.clock, []
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    platform.release_freed_memory()
    updates = with_reference(run, updates_of(run, step, groups))
    platform.release_freed_memory()
    clock.mark("reference")
    for batches in updates:
        stats = policy_backward(run.chunks, run.optimizer, batches, run.settings.rl, run.groups)
        clock.mark("policy")
        if run.guard.admits(step, stats, batches):
            parity.check(stats, rollouts, run.models[0], run.settings.rl, step)
            update(run.optimizer, stats.grad_norm, lr)
        clock.mark("update")
        run.tokens += stats.tokens
        seen.append(stats)
    every = run.settings.rl.reference_every
    if run.reference is not None and every and step % every == 0:
        run.reference.update(run.settings.rl.reference_alpha)
    return seen


def shaped(run: PolicyRun, step: int, groups: Sequence[RolloutGroup]) -> Sequence[RolloutGroup]:
    """The groups with what `rl.overlong` and `rl.kl_in` add to rewards. Marks the clock: reference."""
    rl = run.settings.rl
    if rl.overlong == "soft":
        groups = with_overlong_penalty(groups, run.settings.sampling.max_tokens, rl.overlong_buffer)
    if rl.kl_in == "reward" and run.reference is not None:
        groups = with_kl(groups, kl_sums(run, step, groups), rl.kl_coefficient)
        run.rollouts.clock.mark("reference")
    return groups


def kl_sums(run: PolicyRun, step: int, groups: Sequence[RolloutGroup]) -> list[float]:
    """Of every rollout the sum over its tokens of KL(policy || reference), by `rl.kl`; the same on every rank."""
    every = {"drop_zero_spread": False, "overlong": "keep", "updates": 1}
    settings = run.settings.model_copy(update={"rl": run.settings.rl.model_copy(update=every)})
    sums = torch.zeros(sum(len(group.rollouts) for group in groups), dtype=torch.float64)
    for batches in reference_scored(run, updates_of(run, step, groups, settings)):
        for batch in batches if run.groups.tp_rank == 0 else ():
            assert batch.loss_mask is not None and batch.reference_logprobs is not None
            kl = kl_estimate(batch.sampler_logprobs, batch.reference_logprobs.cpu(), settings.rl.kl)
            ids = batch.rollout_ids[batch.seq_idx.flatten().long()]
            inside = batch.loss_mask.flatten()
            sums.index_add_(0, ids[inside], kl.flatten()[inside].double())
    return summed({"kl": sums.to(run.rollouts.engine.replica.device)})["kl"].tolist()


def updates_of(
    run: PolicyRun, step: int, groups: Sequence[RolloutGroup], settings: RLSettings | None = None
) -> list[list[PolicyBatch]]:
    """This rank's micro-batches of each of `rl.updates` parts of the groups; a part without any sample is left out."""
    settings, ranks = settings or run.settings, run.groups
    per_update = len(groups) // settings.rl.updates
    multiple = ranks.tp_size if settings.parallel.sequence_parallel else 1
    multiple *= FP8_MULTIPLE if settings.precision.fp8 != "off" else 1
    share = shares_prompts(settings.rl)
    values = advantages(groups, settings.rl.advantage, settings.rl.advantage_eps)
    updates: list[list[PolicyBatch]] = []
    for number in range(settings.rl.updates):
        first = number * per_update
        part = slice(first, first + per_update)
        samples = samples_of(
            groups[part],
            settings.rl,
            first * settings.sampling.samples,
            longest=settings.sampling.max_tokens,
            values=values[part],
        )
        made = units(samples, ranks.dp_size, budget(settings)) if share else [(sample,) for sample in samples]
        dealt = micro_batches(list(map(unit_length, made)), ranks.dp_size, budget(settings))[ranks.dp_rank]
        batches = [
            pack(
                [sample for place in sorted(places) for sample in made[place]],
                version=version(settings, step) + len(updates),
                temperature=settings.sampling.temperature or 1.0,  # greedy log-probs are those at 1
                multiple=multiple,
                share=share,
            )
            for places in dealt or [[]]
        ]
        if samples:
            updates.append(batches)
    return updates


def with_reference(run: PolicyRun, updates: list[list[PolicyBatch]]) -> list[list[PolicyBatch]]:
    """The same with the reference policy's log-probs, where the loss has a KL term."""
    if run.reference is None or run.settings.rl.kl_in != "loss" or not updates:
        return updates
    return reference_scored(run, updates)


def reference_scored(run: PolicyRun, updates: list[list[PolicyBatch]]) -> list[list[PolicyBatch]]:
    assert run.reference is not None, "a KL coefficient keeps a reference"
    with gathered_parameters(run.chunks), run.reference.in_place():
        scored = [score(run.chunks, batches) for batches in updates]
    return [
        [replace(batch, reference_logprobs=of_batch) for batch, of_batch in zip(batches, logprobs, strict=True)]
        for batches, logprobs in zip(updates, scored, strict=True)
    ]


def version(settings: RLSettings, step: int) -> int:
    """Optimizer updates that the weights have seen before a step."""
    return (step - 1) * settings.rl.updates


def shares_prompts(settings: PolicySettings) -> bool:
    """`rl.share_prompts`, and what it is where nobody chose."""
    return settings.parity != "exact" if settings.share_prompts is None else settings.share_prompts


def budget(settings: RLSettings) -> int:
    """Tokens of a micro-batch."""
    return settings.train.micro_batch * settings.rl.context
