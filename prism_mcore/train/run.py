"""What every training run is made of: start and finish, its folder, model and optimizer, saving and resuming."""

import gc
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
import yaml
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from prism_mcore import platform
from prism_mcore.agree import gather_failures
from prism_mcore.checkpoint.folder import CheckpointError, checkpoint_in, newest_undamaged, read_state
from prism_mcore.checkpoint.load import Loaded, load, load_weights
from prism_mcore.checkpoint.lock import InUse, exclusive
from prism_mcore.checkpoint.save import Checkpoints
from prism_mcore.checkpoint.sharded import Owned
from prism_mcore.config import SettingsError, dump
from prism_mcore.convert.offline import remember_source
from prism_mcore.convert.online import load_hf
from prism_mcore.data.history import History
from prism_mcore.exit_codes import STOPPED_BY_GUARD
from prism_mcore.model.build import chunks_of
from prism_mcore.model.hybrid import HybridModel
from prism_mcore.model.parameters import names_matching
from prism_mcore.model.rope import RopeSettings, write_positions
from prism_mcore.model.settings import SOURCE
from prism_mcore.model.spec import ModelSpec
from prism_mcore.parallel import Groups, init_groups
from prism_mcore.train.guards import Guard, GuardStop, Suspects, worst_sequences
from prism_mcore.train.optimizer import build_optimizer, finish_parameter_gather, freeze, wrap
from prism_mcore.train.schedule import learning_rate
from prism_mcore.train.settings import LoopSettings, OptimizerSettings

LOCK = "run.lock"

log = logging.getLogger(__name__)


@dataclass
class Run:
    """What every run has on this rank; each loop adds what it reads."""

    settings: LoopSettings
    spec: ModelSpec
    groups: Groups
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    checkpoints: Checkpoints
    guard: Guard
    resume_from: Path | None  # the newest undamaged checkpoint of the run

    @property
    def models(self) -> list[HybridModel]:
        """The chunks without their wrappers."""
        return [chunk.module for chunk in self.chunks]


AnyRun = TypeVar("AnyRun", bound=Run)


def carry_out(
    settings: LoopSettings,
    build: Callable[[Groups, torch.device, ExitStack], AnyRun],
    train: Callable[[AnyRun], int],
) -> int:
    """Start, build, train, finish; returns one of exit_codes.py. What `build` enters into the stack is closed."""
    timeout = settings.parallel.timeout
    device = platform.start(timeout=timeout, deterministic=settings.run.deterministic)
    groups = init_groups(settings.parallel, settings.run.seed, timeout)
    logging.basicConfig(level=logging.INFO if groups.rank == 0 else logging.ERROR, format="%(message)s")
    logging.getLogger("megatron").setLevel(logging.WARNING)
    with ExitStack() as opened:
        hold_folder(settings, groups, opened)
        run = build(groups, device, opened)
        try:
            code = train(run)
        except GuardStop as stop:  # the same on every rank
            if groups.rank == 0:
                log.error("%s", stop)
            code = STOPPED_BY_GUARD
            run.checkpoints.wait()
    # Not after another error: NCCL would first wait for what this rank has begun and other ranks may never join.
    platform.shutdown()
    return code


def due(step: int, every: int, steps: int) -> bool:
    """Is it time for something done every so many steps, at the start and the end in any case?"""
    return step in (0, steps) or (every > 0 and step % every == 0)


COLLECT_EVERY = 10  # steps


@contextmanager
def collection_between_steps() -> Iterator[Callable[[], None]]:
    """What to call after each step: Python then collects garbage, every so many steps, and nowhere else.

    Otherwise it does so wherever an allocation happens to be one too many, on each rank in another place of another
    step, and the others wait. What lives after the first step, modules and megatron-core's maps of buffers, is not
    looked through again.
    """
    counter = count(1)

    def collect() -> None:
        step = next(counter)
        if step == 1 or step % COLLECT_EVERY == 0:
            gc.collect()
        if step == 1:
            gc.freeze()

    gc.disable()
    try:
        yield collect
    finally:
        gc.unfreeze()
        gc.enable()


def hold_folder(settings: LoopSettings, groups: Groups, opened: ExitStack) -> None:
    """Take the run's folder for this process group alone, until `opened` closes: rank 0 holds the lock for all.

    A SettingsError on every rank where another run is in it, naming its host, process and start.
    """
    failure = ""
    if groups.rank == 0:
        try:
            settings.run_dir.mkdir(parents=True, exist_ok=True)
            opened.enter_context(exclusive(settings.run_dir / LOCK))
        except InUse as error:
            failure = f"{error}; wait until it has ended, or give run.name another value"
        except OSError as error:
            failure = f"run.dir: {unusable(settings.run_dir, error)}"
    if failures := gather_failures(failure):
        raise SettingsError(failures[0])


# --- build ------------------------------------------------------------------------------------------------------------


def build_run(
    settings: LoopSettings,
    spec: ModelSpec,
    groups: Groups,
    device: torch.device,
    *,
    seq_len: int,
    suspects: Suspects = worst_sequences,
    only: Collection[str] = (),
) -> Run:
    """This rank's part of the model, with its initial weights where there is nothing to resume, and its optimizer.

    seq_len: tokens of a sequence, for which `parallel.split=auto` evens the stages. only: as train.only.
    """
    chunks = chunks_of(settings, spec, groups, device, seq_len=seq_len, recompute=settings.train.recompute)
    if only:
        freeze(chunks, names_matching(spec, only))
    checkpoints = Checkpoints(settings.run_dir / "checkpoints", settings.checkpoint, groups)
    require_shared(checkpoints.folder, groups)
    resume_from = newest_undamaged(checkpoints.folder) if settings.checkpoint.resume else None
    if resume_from is None:
        set_initial_weights(settings, chunks, groups)
    wrapped = wrap_chunks(settings, chunks, groups, device)
    optimizer = build_optimizer(wrapped, settings.optimizer, groups)
    guard = Guard(settings.guards, settings.run_dir, groups, suspects)
    return Run(settings, spec, groups, wrapped, optimizer, checkpoints, guard, resume_from)


def wrap_chunks(
    settings: LoopSettings, chunks: list[HybridModel], groups: Groups, device: torch.device
) -> list[DistributedDataParallel]:
    """The chunks with gradient buffers, reduced as the settings say."""
    return wrap(
        chunks,
        groups,
        optimizer_instances=settings.parallel.optimizer_instances,
        grad_reduce=settings.optimizer.grad_reduce,
        bucket_size=settings.optimizer.bucket_size,
        # On one data-parallel rank, too: megatron-core splits its buffers into buckets only then, and a save holds two
        # copies of a bucket in fp32 on the GPU.
        overlap=device.type == "cuda",
    )


def require_shared(folder: Path, groups: Groups) -> None:
    """Make the folder; a SettingsError on every rank where one cannot use it, or does not see what rank 0 puts there.

    No save would succeed.
    """
    failure, marks = "", [folder / f".tmp_{uuid4().hex}"]
    if groups.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            marks[0].touch()
        except OSError as error:
            failure = unusable(folder, error)
    dist.broadcast_object_list(marks, src=0)
    if not failure and groups.rank > 0:
        failure = _unseen(folder / marks[0].name, groups.rank)
    failures = gather_failures(failure)
    if groups.rank == 0 and not failure:
        marks[0].unlink(missing_ok=True)
    if failures:
        raise SettingsError(f"run.dir: {failures[0]}")


def unusable(folder: Path, error: OSError) -> str:
    """What the system says against a run's folder, and what to change."""
    return (
        f"cannot write into {folder} ({error.strerror}: {error.filename}); give run.dir and run.name a folder that can"
        " be made and written"
    )


def _unseen(mark: Path, rank: int) -> str:
    try:
        mark.stat()
    except FileNotFoundError:
        return f"rank {rank} does not see {mark}, which rank 0 has written; put it where all nodes see it"
    except OSError as error:
        return f"rank {rank}: {unusable(mark.parent, error)}"
    return ""


def set_initial_weights(settings: LoopSettings, chunks: list[HybridModel], groups: Groups) -> None:
    """Weights as `model.init` says: drawn from run.seed, those of a Hugging Face directory, or of a checkpoint."""
    init = settings.model.init
    if init == "random":
        for chunk in chunks:
            chunk.initialise(settings.run.seed)
    elif (Path(init) / "config.json").is_file():
        load_hf(init, chunks, groups)
    else:
        try:
            load_weights(checkpoint_in(Path(init)), chunks, groups)
        except CheckpointError as error:
            raise SettingsError(f"model.init={init}: {error}") from error
    if groups.rank == 0:  # what an export needs to know
        remember_source(init, settings.model.spec, settings.run_dir / SOURCE)
        if settings.model.rope != RopeSettings():
            write_positions(settings.run_dir / SOURCE / "config.json", chunks[0].spec)


# --- save and resume --------------------------------------------------------------------------------------------------


def save_run(
    run: Run, step: int, state: dict[str, Any], fixed: dict[str, Any], more: dict[str, Iterable[Owned]] | None = None
) -> None:
    """A checkpoint after `step` steps: weights, optimizer, random numbers, and what `state_to_resume` reads.

    state: the loop's own, with its cursor. fixed: settings that must not change in the middle of a run.
    """
    finish_parameter_gather(run.chunks)
    shared = {
        "guard": run.guard.state(),
        "spec": spec_record(run.spec),
        "settings": dump(run.settings),
        "fixed": fixed,
    }
    run.checkpoints.save(step, run.models, run.optimizer, state | shared, more)


def state_to_resume(run: Run, cursor: str, fixed: dict[str, Any]) -> dict[str, Any] | None:
    """What was saved beside the tensors that `load_run` will load, once it is known to be this run's; None without any.

    cursor: the key of the loop's own state that no other kind of run has. Raises SettingsError where model, kind of run
    or fixed settings are others.
    """
    newest = run.resume_from
    if newest is None:
        return None
    state = read_state(newest)["state"]
    if cursor not in state:
        raise SettingsError(
            f"{newest} is of another kind of run; to start from its weights give run.name another value, and"
            f" model.init={newest.parent.parent}"
        )
    if not is_record_of(state["spec"], run.spec):
        raise SettingsError(f"{newest} is of another model; give run.name another value, or model.spec the one it had")
    before = state.get("fixed", state.get("kept", {}))  # earlier versions called them kept, or had none
    for name, now in fixed.items():
        if (then := before.get(name, now)) != now:
            raise SettingsError(
                f"{newest} was trained with {name}={then}, not {now}; resume with {then}, or give run.name another"
                " value"
            )
    return state


def resumed_history(
    run: Run, state: dict[str, Any], now: History, num_samples: int, sources: str, more: Sequence[str] = ()
) -> History:
    """Where each source resumes after num_samples samples; a SettingsError where they changed and may not.

    sources: the setting that lists them; `on_change` stands beside it. more: other differences in what is read.
    """
    section, on_change = sources.split(".")[0], f"{sources.split('.')[0]}.on_change"
    record = state.get("data")
    if record is None:
        log.info("note: %s is of an earlier version, which kept no record of its %s", run.resume_from, sources)
        return now
    differences = [*now.differences(record, sources), *more]
    if not differences:
        return now.resumed(record)
    found = f"{run.resume_from} was trained on other data: {'; '.join(differences)}"
    if getattr(run.settings, section).on_change == "refuse":
        raise SettingsError(
            f"{found}. Give {sources} what it had, or run.name another value; {on_change}=continue resumes with what is"
            " there now, each source from its own number of samples"
        )
    history = now.changed(record, num_samples)
    log.info("%s. Continuing: %s", found, ", ".join(f"{s.name} from its sample {s.read:,}" for s in history.sources))
    return history


def load_run(run: Run, state: dict[str, Any], more: dict[str, Iterable[Owned]] | None = None) -> Loaded:
    """Load the checkpoint whose `state_to_resume` this is: weights, optimizer, random numbers, the guard's state."""
    assert run.resume_from is not None
    loaded = load(run.resume_from, run.models, run.optimizer, run.groups, more)
    run.guard.restore(state["guard"])
    if note := lr_change(loaded.step, state.get("settings", ""), run.settings):
        log.info("%s", note)
    log.info("resuming from %s", loaded.path)
    return loaded


def lr_change(step: int, before: str, now: LoopSettings) -> str:
    """What changed settings of the schedule do to the learning rate after `step` steps; empty where nothing.

    before: the settings that the checkpoint was saved with, as YAML.
    """
    try:
        old = yaml.safe_load(before)
        optimizer, steps = OptimizerSettings.model_validate(old["optimizer"]), int(old["train"]["steps"])
    except (KeyError, TypeError, ValueError, yaml.YAMLError):  # of another version
        return ""
    unchanged = learning_rate(step + 1, optimizer, steps)
    lr = learning_rate(step + 1, now.optimizer, now.train.steps)
    if lr == unchanged or step >= now.train.steps:
        return ""
    here, there = now.optimizer.model_dump(), optimizer.model_dump()
    names = [f"optimizer.{name}={value} ({there[name]} before)" for name, value in here.items() if value != there[name]]
    names += [f"train.steps={now.train.steps} ({steps} before)"] * (steps != now.train.steps)
    return (
        f"note: lr was {learning_rate(step, optimizer, steps):.4g} at step {step} and is {lr:.4g} at step {step + 1},"
        f" where it would have been {unchanged:.4g}: {', '.join(names)}"
    )


def spec_record(spec: ModelSpec) -> dict:
    """The spec as JSON holds it, infinity as text."""
    return {name: repr(value) for name, value in asdict(spec).items()}


def is_record_of(record: dict, spec: ModelSpec) -> bool:
    """Is this the spec's record, perhaps an earlier version's? What that did not know, no model of it had."""
    unknown = {f.name: repr(f.default) for f in fields(ModelSpec) if f.default is not MISSING}
    return unknown | record == spec_record(spec)
