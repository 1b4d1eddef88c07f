"""What a study will take: tokens, rollouts and GPU hours of its nodes, by the planner's formulas."""

from collections.abc import Mapping
from dataclasses import dataclass

from prism_mcore.config import SettingsError
from prism_mcore.console import say, show
from prism_mcore.model.settings import resolve_spec
from prism_mcore.plan.hardware import H100
from prism_mcore.plan.report import numbers
from prism_mcore.plan.rollouts import rl_step_seconds
from prism_mcore.plan.throughput import TUNED, TYPICAL, Layout, step_time
from prism_mcore.rl.settings import RLSettings
from prism_mcore.study.graph import Node
from prism_mcore.study.settings import StudyProgram
from prism_mcore.train.plan import layout_of
from prism_mcore.train.settings import MidtrainSettings


@dataclass(frozen=True)
class Work:
    """Of one node: what it trains on and H100 hours of all its GPUs, tuned and typical."""

    tokens: int = 0
    rollouts: int = 0
    hours: tuple[float, float] | None = None


def work_of(node: Node, response_tokens: int) -> Work:
    """By formula; nothing for nodes that the planner has none for (merging, evaluating, analysing)."""
    if isinstance(node.settings, MidtrainSettings):
        return _midtraining(node.settings, node.ranks)
    if isinstance(node.settings, RLSettings):
        return _rl(node.settings, node.ranks, response_tokens)
    return Work()


def _midtraining(settings: MidtrainSettings, gpus: int) -> Work:
    tokens = settings.train.steps * settings.train.global_batch * settings.data.seq_len
    try:
        rate = step_time(resolve_spec(settings.model), layout_of(settings, gpus), H100).rate
    except SettingsError:  # the shape comes from a directory that is not here
        return Work(tokens)
    return Work(tokens, hours=(tokens / (TUNED * rate) / 3600, tokens / (TYPICAL * rate) / 3600))


def _rl(settings: RLSettings, gpus: int, response_tokens: int) -> Work:
    in_step = settings.rl.prompts_per_step * settings.sampling.samples
    rollouts = in_step * settings.train.steps
    try:
        spec = resolve_spec(settings.model)
    except SettingsError:
        return Work(rollouts=rollouts)
    parallel = settings.parallel
    layout = Layout(
        gpus=gpus,
        seq_len=settings.rl.context,
        global_batch=0,
        micro_batch=settings.train.micro_batch,
        tp=parallel.tp,
        pp=parallel.pp,
        vpp=parallel.vpp,
        cp=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        recompute=frozenset(settings.train.recompute),
        optimizer_instances=parallel.optimizer_instances,
    )
    tokens = min(response_tokens, settings.sampling.max_tokens)
    reference = settings.rl.kl_coefficient > 0
    step = rl_step_seconds(spec, layout, H100, rollouts=in_step, response_tokens=tokens, reference=reference)
    hours = settings.train.steps * sum(step.values()) * gpus / 3600
    return Work(rollouts=rollouts, hours=(hours / TUNED, hours / TYPICAL))


def print_plan(study: StudyProgram, nodes: Mapping[str, Node]) -> None:
    """A line for each arm of a model, evaluation and analysis, with how many nodes it has; and the sums."""
    groups: dict[tuple[str, str, str], list[Node]] = {}
    for node in nodes.values():
        trained = node.settings is not None
        label, model = (node.label, node.model) if trained else (node.label.split(" of ")[0], "-")
        groups.setdefault((node.kind, label, model), []).append(node)
    rows = []
    tokens = rollouts = unplanned = 0
    low = high = 0.0
    for (kind, label, model), members in groups.items():
        work = [work_of(node, study.study.response_tokens) for node in members]
        hours = [one.hours for one in work if one.hours]
        first, ranks = work[0], members[0].ranks
        size = f"{first.tokens / 1e9:,.4g} B tokens" if first.tokens >= 1e8 else f"{first.tokens:,} tokens"
        size = f"{first.rollouts:,} rollouts" if first.rollouts else size if first.tokens else "-"
        each = f"{_hours(hours[0][0])} to {_hours(hours[0][1])}" if hours else "-"
        rows.append((label, model, kind, str(len(members)), str(ranks), size, each))
        tokens, rollouts = tokens + sum(w.tokens for w in work), rollouts + sum(w.rollouts for w in work)
        low, high = low + sum(h[0] for h in hours), high + sum(h[1] for h in hours)
        unplanned += len(members) - len(hours)
    columns = ("", "model", "what", "nodes", "ranks", "each", "H100 hours")
    show(numbers(f"{study.study.name}: {len(nodes)} nodes", columns, rows))
    say(f"{tokens / 1e9:,.4g} B tokens of mid-training, {rollouts:,} rollouts, {low:,.0f} to {high:,.0f} H100 hours")
    say(
        "Hours are predicted, tuned to typical, by the formulas of tools/plan.py; nothing was measured. RL assumes a"
        f" mean response of {study.study.response_tokens:,} tokens and no wait for longer ones. {unplanned} nodes"
        " have no formula (evaluating, analysing, merging) and are not counted."
    )


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
