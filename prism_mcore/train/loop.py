"""The mid-training run: fetch, step, update, log, validate, save, in that order."""

import contextlib
import logging
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from prism_mcore import platform
from prism_mcore.agree import gather_failures
from prism_mcore.checkpoint.folder import CheckpointError, latest, newest_undamaged, read_state
from prism_mcore.checkpoint.load import load, load_weights
from prism_mcore.checkpoint.save import Checkpoints
from prism_mcore.config import Settings, SettingsError, dump, resolve_spec
from prism_mcore.convert.checkpoint import SOURCE, remember_source
from prism_mcore.convert.hf import load_hf
from prism_mcore.data.loader import DataLoader
from prism_mcore.data.token_file import TokenFileError
from prism_mcore.exit_codes import DONE, STOPPED_BY_GUARD, STOPPED_BY_SIGNAL
from prism_mcore.model.build import chunks_of
from prism_mcore.model.hybrid import HybridModel
from prism_mcore.model.spec import ModelSpec
from prism_mcore.parallel import Groups, init_groups
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
    timeout = longest_wait(settings)
    device = platform.start(timeout=timeout, deterministic=settings.run.deterministic)
    groups = init_groups(settings.parallel, settings.run.seed, timeout)
    logging.basicConfig(level=logging.INFO if groups.rank == 0 else logging.ERROR, format="%(message)s")
    logging.getLogger("megatron").setLevel(logging.WARNING)
    started = build(settings, groups, device)
    try:
        code = train(started)
    except GuardStop as stop:  # the same on every rank
        if groups.rank == 0:
            log.error("%s", stop)
        code = STOPPED_BY_GUARD
        started.checkpoints.wait()
    # Not after another error: NCCL would first wait for what this rank has begun and other ranks may never join.
    platform.shutdown()
    return code


def longest_wait(settings: Settings) -> timedelta:
    """Time-out of a collective: in one, ranks that have written their part of a checkpoint wait for the others."""
    checkpoint = settings.checkpoint
    waits = timedelta(seconds=0 if checkpoint.async_save else checkpoint.save_deadline_s)
    return max(platform.COLLECTIVE_TIMEOUT, waits)


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
        "kept": kept(run.settings),
    }
    run.checkpoints.save(step, models(run.chunks), run.optimizer, state)


def kept(settings: Settings) -> dict[str, Any]:
    """What must not change in the middle of a run: samples would be read twice, or never, or be those held out."""
    return {
        "run.seed": settings.run.seed,
        "train.global_batch": settings.train.global_batch,
        "data.seq_len": settings.data.seq_len,
        "data.packing": settings.data.packing,
        "data.validation_fraction": settings.data.validation_fraction,
    }


def resume(run: Run) -> int:
    """Load the checkpoint to go on from, where there is one; returns the steps taken so far."""
    newest = run.resume_from
    if newest is None:
        return 0
    state = read_state(newest)["state"]
    if "samples" not in state:
        raise SettingsError(f"{newest} is of another kind of run; give run.name another value")
    if state["spec"] != spec_record(run.spec):
        raise SettingsError(f"{newest} is of another model; give run.name another value, or model.spec the one it had")
    before = state.get("kept", {})  # runs of an earlier version have none
    for name, now in kept(run.settings).items():
        if (then := before.get(name, now)) != now:
            raise SettingsError(
                f"{newest} was trained with {name}={then}, not {now}; go on with {then}, or give run.name another value"
            )
    loaded = load(newest, models(run.chunks), run.optimizer, run.groups)
    run.guard.restore(loaded.state["guard"])
    log.info("going on from %s", loaded.path)
    return loaded.step


def build(settings: Settings, groups: Groups, device: torch.device) -> Run:
    """Open the data, build this rank's part of the model with its initial weights, and its optimizer."""
    spec, train = resolve_spec(settings), settings.train
    loader = open_data(settings, spec, groups)
    for line in loader.report(train.steps * train.global_batch):
        log.info("%s", line)
    chunks = chunks_of(settings, spec, groups, device)
    checkpoints = Checkpoints(settings.run_dir / "checkpoints", settings.checkpoint, groups)
    require_shared(checkpoints.folder, groups)
    resume_from = newest_undamaged(checkpoints.folder) if settings.checkpoint.resume else None
    if resume_from is None:
        set_initial_weights(settings, chunks, groups)
    wrapped = wrap(
        chunks,
        groups,
        optimizer_instances=settings.parallel.optimizer_instances,
        # On one data-parallel rank, too: megatron-core cuts its buffers into buckets only then, and a save holds two
        # copies of a bucket in fp32 on the GPU.
        overlap=device.type == "cuda",
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


def require_shared(folder: Path, groups: Groups) -> None:
    """A SettingsError on every rank where one does not see what rank 0 puts into the folder: no save would succeed."""
    failure, mark = "", folder / f".tmp_{uuid4().hex}"
    if groups.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            failure = str(error)
    marks = [mark]
    dist.broadcast_object_list(marks, src=0)
    if not failure and not (folder / marks[0].name).exists():
        failure = f"rank {groups.rank} does not see {marks[0]}, which rank 0 has written; put it where all nodes see it"
    failures = gather_failures(failure)
    mark.unlink(missing_ok=True)
    if failures:
        raise SettingsError(f"run.dir: {failures[0]}")


def open_data(settings: Settings, spec: ModelSpec, groups: Groups) -> DataLoader:
    """The loader; a SettingsError on every rank where one of them, perhaps on another node, cannot read a source."""
    loader, failure = None, ""
    try:
        loader = DataLoader(
            settings.data,
            vocab_size=spec.vocab_size,
            seed=settings.run.seed,
            global_batch=settings.train.global_batch,
            micro_batch=settings.train.micro_batch,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
            needs_tokens=groups.is_first_stage,
            needs_labels=groups.is_last_stage,
        )
    except (TokenFileError, OSError) as error:
        failure = str(error)
    if failures := gather_failures(failure):
        raise SettingsError("; ".join(sorted(set(failures))))
    assert loader is not None
    return loader


def set_initial_weights(settings: Settings, chunks: list[HybridModel], groups: Groups) -> None:
    """Weights as `model.init` says: drawn from run.seed, those of a Hugging Face directory, or of a checkpoint."""
    init = settings.model.init
    if init == "random":
        for chunk in chunks:
            chunk.initialise(settings.run.seed)
    elif (Path(init) / "config.json").is_file():
        load_hf(init, chunks, groups)
    else:
        try:
            load_weights(checkpoint_of(init), chunks, groups)
        except CheckpointError as error:
            raise SettingsError(f"model.init={init}: {error}") from error
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
