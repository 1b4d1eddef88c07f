"""An RL run on one rank: what it is built of, what is saved of it, and how it resumes."""

import logging
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from prism_mcore.agree import gather_failures
from prism_mcore.batch import PackedBatch, PolicyBatch, RolloutGroup
from prism_mcore.checkpoint.optimizer_state import initialise_state
from prism_mcore.checkpoint.sharded import Owned
from prism_mcore.config import SettingsError
from prism_mcore.generate.engine import Engine
from prism_mcore.meeting import Meeting
from prism_mcore.model.settings import resolve_spec
from prism_mcore.parallel import Groups
from prism_mcore.rewards.verifier import Verifier
from prism_mcore.rl import parity, unfinished
from prism_mcore.rl.prompts import Prompts
from prism_mcore.rl.reference import Reference
from prism_mcore.rl.rollout import RolloutWorker
from prism_mcore.rl.settings import RLSettings
from prism_mcore.train.guards import GuardedStats
from prism_mcore.train.run import Run, build_run, load_run, resumed_history, save_run, state_to_resume

log = logging.getLogger(__name__)


@dataclass
class PolicyRun(Run):
    """A run that samples from the model that it trains."""

    settings: RLSettings
    prompts: Prompts
    rollouts: RolloutWorker
    reference: Reference | None  # None without a KL term
    tokens: int = 0  # in the losses so far
    asked: int = 0  # prompts so far
    drawn: int = 0  # groups of the last step, those that dynamic sampling left out included
    unfinished: list[RolloutGroup] = field(default_factory=list)  # under `rl.token_budget`


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
        rules = settings.rewards
        verifier = opened.enter_context(Verifier(rules.workers, rules.timeout_s, rewards, rules.code_limits()))
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
    asked = {"data": run.prompts.training.history.record(run.asked), "beside": run.prompts.beside}
    carried = {"unfinished": unfinished.to_record(run.unfinished)}
    state = {"prompts": run.asked, "tokens": run.tokens, **asked, **carried}
    save_run(run, step, state, fixed_settings(run.settings), _more(run))


def _more(run: PolicyRun) -> dict[str, Iterable[Owned]]:
    return {"reference.": run.reference.owned()} if run.reference is not None else {}


def resume(run: PolicyRun) -> int:
    """Load the checkpoint to resume from, where there is one; returns the steps taken so far."""
    state = state_to_resume(run, "prompts", fixed_settings(run.settings))
    if state is None:
        return 0
    training, before = run.prompts.training, state.get("beside", run.prompts.beside)
    others = [f"{name} is another" for name, now in run.prompts.beside.items() if before.get(name) != now]
    training.follow(resumed_history(run, state, training.history, state["prompts"], "rl.prompts", others))
    loaded = load_run(run, state, _more(run))
    run.tokens, run.asked = state["tokens"], state["prompts"]
    run.unfinished, dropped = unfinished.from_record(state.get("unfinished", []), training)
    if dropped:
        log.info("%d unfinished groups of rollouts are left out: their prompts are no longer there", dropped)
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


def with_parity(settings: RLSettings) -> RLSettings:
    """The settings with the op set that `rl.parity` needs; a SettingsError where it cannot be had."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kernels = parity.op_set(settings.rl.parity, settings.kernels, device)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return settings.model_copy(update={"kernels": kernels})


def suspects(stats: GuardedStats, batches: Sequence[PackedBatch]) -> list[str]:
    """The rollouts of this rank's micro-batches whose loss is not finite; all where only a gradient is not."""
    losses = [loss for (loss,) in stats.row_losses or []]
    listed = [
        batch.rollout_ids
        for batch, loss in zip(batches, losses, strict=True)
        if isinstance(batch, PolicyBatch) and (math.isfinite(stats.loss) or not math.isfinite(loss))
    ]
    return [f"rollout {place} of the step" for ids in listed for place in ids.tolist() if place >= 0]
