"""Can these settings work? Mid-training's check, and what RL's shares with it; pure, before any process group."""

from math import prod

from prism_mcore.config import Findings
from prism_mcore.data.settings import normalised_shares
from prism_mcore.model.checks import (
    check_build,
    check_context_shards,
    check_fp8_tokens,
    check_initial_weights,
    check_pipeline,
    check_positions,
    check_recompute,
    nearest_multiples,
)
from prism_mcore.model.parameters import names_matching, parameters
from prism_mcore.model.spec import LAYER_NAMES, ModelSpec
from prism_mcore.train.settings import LoopSettings, MidtrainSettings
from prism_mcore.train.sinks import missing


def check(settings: MidtrainSettings, spec: ModelSpec, world_size: int) -> list[str]:
    """Check the whole of the settings against the model and the number of ranks.

    Returns notes on what is worth knowing. Raises one SettingsError that lists every problem, each with what was got,
    what was needed and, where there is one, the nearest value that works.
    """
    found = Findings()
    dp = check_loop(settings, spec, world_size, found)
    check_pipeline(settings.parallel, spec, found)
    if dp is not None:
        _check_batches(settings, dp, found)
    _check_sequences(settings, spec, found)
    _check_only(settings, spec, found)
    _check_sources(settings, found)
    return found.conclude()


def check_loop(settings: LoopSettings, spec: ModelSpec, world_size: int, found: Findings) -> int | None:
    """What both loops ask; the data-parallel size, or None where the ranks do not fit."""
    if not settings.run.name:
        found.problems.append("run.name is empty; give run.name=NAME, or a recipe, whose file name it then takes")
    dp = check_build(settings, spec, world_size, found)
    check_initial_weights(settings.model, spec, found)
    check_recompute(settings.train.recompute, spec, found)
    _check_schedule(settings, found)
    _check_reduction(settings, found)
    _check_records(settings, found)
    _check_masters(settings, found)
    return dp


def _check_records(settings: LoopSettings, found: Findings) -> None:
    for name in missing(settings.log):
        found.problems.append(f"log.{name}={getattr(settings.log, name)}: {name} is not installed; pip install {name}")
    best = settings.checkpoint.keep_best
    which, colon, metric = best.partition(":")
    if best and not (which in ("min", "max") and colon and metric.startswith("validation/")):
        found.problems.append(
            f"checkpoint.keep_best={best}: needed: min: or max: and a key of validation.jsonl, such as"
            " min:validation/loss/math or max:validation/reward/correct"
        )
    elif best and not settings.train.validate_every:
        found.problems.append(f"checkpoint.keep_best={best} needs validations; set train.validate_every")


def _check_schedule(settings: LoopSettings, found: Findings) -> None:
    optimizer, steps = settings.optimizer, settings.train.steps
    if optimizer.warmup_steps >= steps:
        found.notes.append(f"optimizer.warmup_steps={optimizer.warmup_steps} of {steps} steps: lr is never reached")
    decay = round(optimizer.decay_fraction * steps)
    if optimizer.schedule == "wsd" and optimizer.warmup_steps + decay > steps:
        found.notes.append(f"wsd decays over the last {decay} steps, which start inside the warm-up: lr is never held")


def _check_reduction(settings: LoopSettings, found: Findings) -> None:
    instances = settings.parallel.optimizer_instances
    if settings.optimizer.grad_reduce == "bf16" and instances > 1:
        found.problems.append(
            f"optimizer.grad_reduce=bf16 needs parallel.optimizer_instances=1, got {instances}: replicas add their"
            " shards in one more reduction, which would round again; use 1, or optimizer.grad_reduce=fp32"
        )


def _check_masters(settings: LoopSettings, found: Findings) -> None:
    if settings.optimizer.masters == "fp32":
        return
    if settings.precision.dtype != "bf16":
        found.problems.append(
            f"optimizer.masters=remainder needs precision.dtype=bf16, got {settings.precision.dtype}: an fp32 weight is"
            " its own master; use optimizer.masters=fp32"
        )
    if (backend := settings.kernels.get("adamw")) in ("te", "apex"):
        found.problems.append(
            f"optimizer.masters=remainder is our own AdamW's, got kernels.adamw={backend}; use triton, or torch"
        )


def _check_batches(settings: MidtrainSettings, dp: int, found: Findings) -> None:
    train, parallel = settings.train, settings.parallel
    step = train.micro_batch * dp
    if train.global_batch % step:
        found.problems.append(
            f"train.global_batch={train.global_batch} is not a multiple of micro_batch*dp={step};"
            f" {nearest_multiples(train.global_batch, step)}"
        )
    elif parallel.vpp > 1 and parallel.pp > 1 and (micro_batches := train.global_batch // step) % parallel.pp:
        found.problems.append(
            f"interleaving (vpp={parallel.vpp}) needs a multiple of pp={parallel.pp} micro-batches per step, got"
            f" {micro_batches}; for train.global_batch,"
            f" {nearest_multiples(train.global_batch, step * parallel.pp)}"
        )


def _check_sequences(settings: MidtrainSettings, spec: ModelSpec, found: Findings) -> None:
    parallel, seq_len = settings.parallel, settings.data.seq_len
    name, tokens = "data.seq_len * train.micro_batch", seq_len * settings.train.micro_batch
    check_context_shards(name, tokens, settings, found)
    if parallel.cp == 1 and parallel.sequence_parallel and parallel.tp > 1 and seq_len % parallel.tp:
        found.problems.append(
            f"data.seq_len={seq_len} is not a multiple of tp={parallel.tp}, which sequence_parallel needs;"
            f" {nearest_multiples(seq_len, parallel.tp)}"
        )
    check_fp8_tokens(name, tokens, settings, found)
    check_positions("data.seq_len", seq_len, spec, found)


def _check_only(settings: MidtrainSettings, spec: ModelSpec, found: Findings) -> None:
    try:
        chosen = names_matching(spec, settings.train.only)
    except KeyError as error:
        kinds = sorted({LAYER_NAMES[kind] for kind in spec.pattern})
        found.problems.append(
            f"train.only: the model has no parameter {error.args[0]}; there are {', '.join(kinds)}, and names such as"
            f" {', '.join(list(parameters(spec))[:3])}"
        )
        return
    if settings.train.only:
        table = parameters(spec)
        count, whole = (sum(prod(table[name].shape) for name in names) for names in (chosen, table))
        found.notes.append(f"train.only trains {count:,} of {whole:,} parameters ({count / whole:.1%})")


def _check_sources(settings: MidtrainSettings, found: Findings) -> None:
    try:
        _, note = normalised_shares(settings.data.sources)
    except ValueError as error:
        found.problems.append(str(error))
    else:
        found.notes.extend([note] if note else [])
