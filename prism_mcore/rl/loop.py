"""The RL run: prompts, rollouts, advantages, reference, update, log, evaluate, save, in that order."""

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from prism_mcore import platform
from prism_mcore.agree import gather_failures
from prism_mcore.batch import PackedBatch, PolicyBatch, RolloutGroup
from prism_mcore.checkpoint.optimizer_state import initialise_state
from prism_mcore.config import SettingsError
from prism_mcore.exit_codes import DONE, STOPPED_BY_SIGNAL
from prism_mcore.generate.engine import Engine
from prism_mcore.meeting import Meeting
from prism_mcore.model.settings import resolve_spec
from prism_mcore.parallel import Groups
from prism_mcore.rewards.verifier import Verifier
from prism_mcore.rl import parity
from prism_mcore.rl.metrics import RLMetrics
from prism_mcore.rl.packing import micro_batches, pack, samples_of
from prism_mcore.rl.prompts import Prompts
from prism_mcore.rl.reference import Reference
from prism_mcore.rl.rollout import Interrupted, RolloutWorker
from prism_mcore.rl.settings import RLSettings
from prism_mcore.rl.step import PolicyStats, policy_backward, score
from prism_mcore.train.guards import GuardedStats
from prism_mcore.train.optimizer import gathered_parameters, update
from prism_mcore.train.run import Run, build_run, carry_out, due, load_run, resumed_history, save_run, state_to_resume
from prism_mcore.train.schedule import learning_rate
from prism_mcore.train.signals import SharedSignals

log = logging.getLogger(__name__)


def run(settings: RLSettings, prompts: Prompts) -> int:
    """Improve a policy for `train.steps`, resuming from the newest checkpoint; returns one of exit_codes.py."""
    with_parity(settings)  # refuses what cannot be exact, before anything starts
    return carry_out(
        settings,
        build=lambda groups, device, opened: build(settings, prompts, groups, device, opened),
        train=lambda started: train(started),
    )


@dataclass
class PolicyRun(Run):
    """A run that samples from the model that it trains."""

    settings: RLSettings
    prompts: Prompts
    rollouts: RolloutWorker
    reference: Reference | None  # None without a KL term
    tokens: int = 0  # in the losses so far


def train(run: PolicyRun) -> int:
    """The loop. A signal ends it in the middle of a generation: a step is a pure function of the weights before it."""
    settings, steps = run.settings, run.settings.train.steps
    start = done = saved = resume(run)
    code = DONE
    with RLMetrics(run, start, run.rollouts.clock) as metrics, SharedSignals() as signals:
        run.rollouts.stopping = lambda: signals.anywhere
        try:
            if due(start, settings.train.validate_every, steps) and metrics.lacks_validation(start):
                metrics.log_validation(start, held_out_rollouts(run, start))
            for step in range(start + 1, steps + 1):
                metrics.clock.start()
                groups = training_rollouts(run, step)
                metrics.write_rollouts(step, groups)  # before anything can stop the step
                lr = learning_rate(step, settings.optimizer, steps)
                updates = update_policy(run, step, groups, lr)
                metrics.log(step, groups, updates, lr, run.tokens)
                done = step

                if due(step, settings.train.validate_every, steps):
                    metrics.log_validation(step, held_out_rollouts(run, step))
                if due(step, settings.checkpoint.every, steps):
                    save(run, step)
                    saved = step
                run.checkpoints.poll()
        except Interrupted:
            code = STOPPED_BY_SIGNAL
            if done > saved:
                save(run, done)
            log.info("stopped by a signal after step %d; the same command resumes from here", done)
    run.checkpoints.wait()
    return code


def training_rollouts(run: PolicyRun, step: int) -> list[RolloutGroup]:
    """The step's groups, on every rank: a pure function of (seed, step, weights)."""
    prompts = run.prompts.training.batch(step, run.settings.rl.prompts_per_step)
    with gathered_parameters(run.chunks):
        return run.rollouts.generate(prompts, run.settings.sampling, step=step, version=version(run.settings, step))


def held_out_rollouts(run: PolicyRun, step: int) -> list[RolloutGroup]:
    """Answers to the held-out prompts, with the same uniform numbers after every step; none without such prompts."""
    if run.prompts.held_out is None:
        return []
    rl = run.settings.rl
    sampling = run.settings.sampling.model_copy(update={"samples": rl.held_out_samples})
    with gathered_parameters(run.chunks):
        return run.rollouts.generate(
            run.prompts.held_out.first(rl.held_out_prompts),
            sampling,
            step=0,  # training's steps count from 1
            version=version(run.settings, step + 1),
        )


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


def updates_of(run: PolicyRun, step: int, groups: Sequence[RolloutGroup]) -> list[list[PolicyBatch]]:
    """This rank's micro-batches of each of `rl.updates` parts of the groups; a part without any sample is left out."""
    settings, ranks = run.settings, run.groups
    per_update = len(groups) // settings.rl.updates
    multiple = ranks.tp_size if settings.parallel.sequence_parallel else 1
    updates: list[list[PolicyBatch]] = []
    for number in range(settings.rl.updates):
        first = number * per_update
        samples = samples_of(groups[first : first + per_update], settings.rl, first * settings.sampling.samples)
        dealt = micro_batches([s.length for s in samples], ranks.dp_size, budget(settings))[ranks.dp_rank]
        batches = [
            pack(
                [samples[place] for place in places],
                version=version(settings, step) + len(updates),
                temperature=settings.sampling.temperature or 1.0,  # greedy log-probs are those at 1
                multiple=multiple,
            )
            for places in dealt or [[]]
        ]
        if samples:
            updates.append(batches)
    return updates


def with_reference(run: PolicyRun, updates: list[list[PolicyBatch]]) -> list[list[PolicyBatch]]:
    """The same with the reference policy's log-probs, where there is a reference."""
    if run.reference is None or not updates:
        return updates
    with gathered_parameters(run.chunks), run.reference.in_place():
        scored = [score(run.chunks, batches) for batches in updates]
    return [
        [replace(batch, reference_logprobs=of_batch) for batch, of_batch in zip(batches, logprobs, strict=True)]
        for batches, logprobs in zip(updates, scored, strict=True)
    ]


def with_parity(settings: RLSettings) -> RLSettings:
    """The settings with the op set that `rl.parity` needs; a SettingsError where it cannot be had."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kernels = parity.op_set(settings.rl.parity, settings.kernels, device)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return settings.model_copy(update={"kernels": kernels})


def version(settings: RLSettings, step: int) -> int:
    """Optimizer updates that the weights have seen before a step."""
    return (step - 1) * settings.rl.updates


def budget(settings: RLSettings) -> int:
    """Tokens of a micro-batch."""
    return settings.train.micro_batch * settings.rl.context


def suspects(stats: GuardedStats, batches: Sequence[PackedBatch]) -> list[str]:
    """The rollouts of this rank's micro-batches whose loss is not finite; all where only a gradient is not."""
    losses = [loss for (loss,) in stats.row_losses or []]
    listed = [
        batch.rollout_ids
        for batch, loss in zip(batches, losses, strict=True)
        if isinstance(batch, PolicyBatch) and (math.isfinite(stats.loss) or not math.isfinite(loss))
    ]
    return [f"rollout {place} of the step" for ids in listed for place in ids.tolist() if place >= 0]


# --- build, save, resume ----------------------------------------------------------------------------------------------


def build(settings: RLSettings, prompts: Prompts, groups: Groups, device: torch.device, opened: ExitStack) -> PolicyRun:
    """What every run has, with an engine, a verifier and a reference; `opened` closes what must be closed."""
    spec, longest = resolve_spec(settings.model), settings.rl.context
    require_same(prompts, groups)
    every = build_run(with_parity(settings), spec, groups, device, seq_len=longest, suspects=suspects)
    initialise_state(every.optimizer)  # else the first update makes its moments, in memory that the caches leave free
    reference = Reference(every.chunks, every.optimizer, groups) if settings.rl.kl_coefficient else None
    verifier = None
    if groups.tp_rank == 0:
        rewards = prompts.training.rewards | (prompts.held_out.rewards if prompts.held_out else frozenset())
        verifier = opened.enter_context(Verifier(settings.rewards.workers, settings.rewards.timeout_s, rewards))
    engine = Engine(
        every.models[0], prompts.tokenizer, settings=settings.generate, eos=prompts.eos, context=settings.rl.context
    )
    rollouts = RolloutWorker(
        engine,
        settings.sampling.stop,
        verifier,
        prompts.tokenizer,
        settings.rewards,
        settings.run.seed,
        groups,
        Meeting.of_all_ranks(settings.parallel.timeout),
    )
    return PolicyRun(**vars(every) | {"settings": settings}, prompts=prompts, rollouts=rollouts, reference=reference)


def require_same(prompts: Prompts, groups: Groups) -> None:
    """A SettingsError on every rank where one, perhaps on another node, has read other prompts than rank 0."""
    mine = [source.identity for source in prompts.training.history.sources], prompts.beside
    first = [mine]
    dist.broadcast_object_list(first, src=0)
    if failures := gather_failures(f"rank {groups.rank}" * (mine != first[0])):
        raise SettingsError(f"rl.prompts, rl.held_out or rl.tokenizer hold something else for {', '.join(failures)}")


def save(run: PolicyRun, step: int) -> None:
    """A checkpoint after `step` steps, with the reference policy and what was asked of each prompt file."""
    prompts = step * run.settings.rl.prompts_per_step
    asked = {"data": run.prompts.training.history.record(prompts), "beside": run.prompts.beside}
    reference = run.reference.sharded_state() if run.reference is not None else {}
    state = {"prompts": prompts, "tokens": run.tokens, **asked}
    save_run(run, step, state, fixed_settings(run.settings), reference)


def resume(run: PolicyRun) -> int:
    """Load the checkpoint to resume from, where there is one; returns the steps taken so far."""
    state = state_to_resume(run, "prompts", fixed_settings(run.settings))
    if state is None:
        return 0
    training, before = run.prompts.training, state.get("beside", run.prompts.beside)
    others = [f"{name} is another" for name, now in run.prompts.beside.items() if before.get(name) != now]
    training.follow(resumed_history(run, state, training.history, state["prompts"], "rl.prompts", others))
    reference = run.reference.sharded_state() if run.reference is not None else {}
    loaded = load_run(run, state, reference)
    if run.reference is not None:
        run.reference.load(reference)
    run.tokens = state["tokens"]
    return loaded.step


def fixed_settings(settings: RLSettings) -> dict[str, Any]:
    """What must not change in the middle of a run: each would silently make it another one."""
    rl = settings.rl
    return {
        "run.seed": settings.run.seed,
        "rl.parity": rl.parity,
        "rl.prompts_per_step": rl.prompts_per_step,
        "rl.updates": rl.updates,
        "sampling.samples": settings.sampling.samples,
        "rl.kl_coefficient > 0": rl.kl_coefficient > 0,
    }
