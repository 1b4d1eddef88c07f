"""The mid-training run: fetch, step, update, log, validate, save, in that order."""

import contextlib
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from prism_mcore import platform
from prism_mcore.config import Settings, SettingsError, dump, resolve_spec
from prism_mcore.convert.checkpoint import SOURCE, remember_source
from prism_mcore.convert.hf import load_hf
from prism_mcore.data.loader import DataLoader
from prism_mcore.exit_codes import DONE, STOPPED_BY_GUARD, STOPPED_BY_SIGNAL
from prism_mcore.model.build import chunks_of
from prism_mcore.model.hybrid import HybridModel
from prism_mcore.model.spec import ModelSpec
from prism_mcore.parallel import Groups, destroy_groups, init_groups
from prism_mcore.train.checkpoint import Checkpoints, latest, load, load_weights, newest_undamaged, read_state
from prism_mcore.train.guards import Guard, GuardStop
from prism_mcore.train.metrics import Metrics
from prism_mcore.train.optimizer import build_optimizer, finish_parameter_gather, update, wrap
from prism_mcore.train.schedule import learning_rate
from prism_mcore.train.signals import Signals
from prism_mcore.train.step import train_step
from prism_mcore.train.validation import validate

log = logging.getLogger(__name__)


def run(settings: Settings) -> int:
    """Mid-train to `train.steps`, going on from the newest checkpoint of the run; returns one of exit_codes.py."""
    device = platform.start(deterministic=settings.run.deterministic)
    groups = init_groups(settings.parallel, settings.run.seed)
    logging.basicConfig(level=logging.INFO if groups.rank == 0 else logging.ERROR, format="%(message)s")
    logging.getLogger("megatron").setLevel(logging.WARNING)
    try:
        return train(build(settings, groups, device))
    except GuardStop as stop:
        log.error("%s", stop)
        return STOPPED_BY_GUARD
    finally:
        destroy_groups()


@dataclass(frozen=True)
class Run:
    """Everything a run is made of, on this rank."""

    settings: Settings
    spec: ModelSpec
    groups: Groups
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    loader: DataLoader
    checkpoints: Checkpoints
    guard: Guard
    resume_from: Path | None  # the newest undamaged checkpoint of the run, to go on from


def train(run: Run) -> int:
    """The loop."""
    settings, chunks, steps = run.settings, run.chunks, run.settings.train.steps
    start = resume(run)
    batches = run.loader.steps(start)
    with Metrics(run, start) as metrics, Signals() as signals, contextlib.closing(batches):
        if start == 0:
            metrics.log_validation(0, held_out_losses(run))
        for step in range(start + 1, steps + 1):
            metrics.start_step()
            batch = next(batches)
            metrics.mark("data")
            stats = train_step(chunks, run.optimizer, batch, run.groups, len(run.loader.sources))
            metrics.mark("forward_backward")
            lr = learning_rate(step, settings.optimizer, steps)
            if run.guard.admits(step, stats, batch):
                update(run.optimizer, stats.grad_norm, lr)
            metrics.mark("update")
            metrics.log(step, stats, lr)

            if due(step, settings.train.validate_every, steps):
                metrics.log_validation(step, held_out_losses(run))
            stop = signals.received()
            if stop or due(step, settings.checkpoint.every, steps):
                save(run, step)
            run.checkpoints.poll()
            if stop and step < steps:
                log.info("stopped by a signal after step %d; the same command goes on from here", step)
                break
    run.checkpoints.wait()
    return STOPPED_BY_SIGNAL if start < steps and step < steps else DONE


def due(step: int, every: int, steps: int) -> bool:
    """Is it time for something done every so many steps, and at the end in any case?"""
    return step == steps or (every > 0 and step % every == 0)


def held_out_losses(run: Run) -> dict[str, float]:
    """Validation loss by domain, in nats per token."""
    train = run.settings.train
    return validate(run.chunks, run.loader, run.groups, train.validate_batches * train.global_batch)


def save(run: Run, step: int) -> None:
    """A checkpoint after `step` steps: weights, optimizer, random numbers, and what `resume` needs beside them."""
    finish_parameter_gather(run.chunks)
    state = {
        "samples": step * run.settings.train.global_batch,  # the data cursor
        "guard": run.guard.state(),
        "spec": spec_record(run.spec),
        "settings": dump(run.settings),
    }
    run.checkpoints.save(step, models(run.chunks), run.optimizer, state)


def resume(run: Run) -> int:
    """Load the checkpoint to go on from, where there is one; returns the steps taken so far."""
    newest = run.resume_from
    if newest is None:
        return 0
    batch, record = run.settings.train.global_batch, read_state(newest)
    if record["state"]["spec"] != spec_record(run.spec):
        raise SettingsError(f"{newest} is of another model; give run.name another value, or model.spec the one it had")
    if record["state"]["samples"] != record["step"] * batch:
        taken = record["state"]["samples"] // record["step"]
        raise SettingsError(f"{newest} was trained with train.global_batch={taken}, not {batch}; go on with {taken}")
    loaded = load(newest, models(run.chunks), run.optimizer, run.groups)
    run.guard.restore(loaded.state["guard"])
    log.info("going on from %s", loaded.path)
    return loaded.step


def build(settings: Settings, groups: Groups, device: torch.device) -> Run:
    """Open the data, build this rank's part of the model with its initial weights, and its optimizer."""
    spec, train = resolve_spec(settings), settings.train
    loader = DataLoader(
        settings.data,
        vocab_size=spec.vocab_size,
        seed=settings.run.seed,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        needs_tokens=groups.is_first_stage,
        needs_labels=groups.is_last_stage,
    )
    for line in loader.report(train.steps * train.global_batch):
        log.info("%s", line)
    chunks = chunks_of(settings, spec, groups, device)
    checkpoints = Checkpoints(settings.run_dir / "checkpoints", settings.checkpoint, groups)
    resume_from = newest_undamaged(checkpoints.folder) if settings.checkpoint.resume else None
    if resume_from is None:
        set_initial_weights(settings, chunks, groups)
    wrapped = wrap(
        chunks,
        groups,
        optimizer_instances=settings.parallel.optimizer_instances,
        overlap=device.type == "cuda" and groups.dp_size > 1,
    )
    return Run(
        settings,
        spec,
        groups,
        wrapped,
        build_optimizer(wrapped, settings.optimizer, groups),
        loader,
        checkpoints,
        Guard(settings.guards, settings.run_dir, groups),
        resume_from,
    )


def set_initial_weights(settings: Settings, chunks: list[HybridModel], groups: Groups) -> None:
    """Weights as `model.init` says: drawn from run.seed, those of a Hugging Face directory, or of a checkpoint."""
    init = settings.model.init
    if init == "random":
        for chunk in chunks:
            chunk.initialise(settings.run.seed)
    elif (Path(init) / "config.json").is_file():
        load_hf(init, chunks, groups)
    else:
        load_weights(checkpoint_of(init), chunks, groups)
    if groups.rank == 0:  # what an export needs to know
        remember_source(init, settings.model.spec, settings.run_dir / SOURCE)


def checkpoint_of(path: str) -> Path:
    """A checkpoint's folder, given that or a run's: then its newest."""
    for folder in (Path(path), Path(path) / "checkpoints"):
        if (found := folder if (folder / "state.json").is_file() else latest(folder)) is not None:
            return found
    raise SettingsError(
        f"model.init={path} holds neither a Hugging Face model nor a checkpoint; give a directory that does, or random"
    )


def models(chunks: list[DistributedDataParallel]) -> list[HybridModel]:
    """The chunks without their wrappers."""
    return [chunk.module for chunk in chunks]


def spec_record(spec: ModelSpec) -> dict:
    """The spec as JSON holds it, infinity as text."""
    return {name: repr(value) for name, value in asdict(spec).items()}
