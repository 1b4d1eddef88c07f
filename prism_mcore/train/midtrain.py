"""A mid-training run on one rank: what it is built of, what is saved of it, and how it resumes."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from prism_mcore.agree import gather_failures
from prism_mcore.config import SettingsError
from prism_mcore.data.history import History
from prism_mcore.data.loader import DataLoader
from prism_mcore.data.token_file import TokenFileError
from prism_mcore.model.settings import resolve_spec
from prism_mcore.model.spec import ModelSpec
from prism_mcore.parallel import Groups
from prism_mcore.train.run import Run, build_run, load_run, resumed_history, save_run, state_to_resume
from prism_mcore.train.settings import MidtrainSettings

log = logging.getLogger(__name__)


@dataclass
class MidtrainRun(Run):
    """A run that reads a corpus."""

    settings: MidtrainSettings
    loader: DataLoader
    history: History  # of its sources


def save(run: MidtrainRun, step: int) -> None:
    """A checkpoint after `step` steps, with what was read of each source."""
    samples = step * run.settings.train.global_batch
    save_run(run, step, {"samples": samples, "data": run.history.record(samples)}, fixed_settings(run.settings))


def resume(run: MidtrainRun) -> int:
    """Load the checkpoint to resume from, where there is one; returns the steps taken so far."""
    step, state = 0, state_to_resume(run, "samples", fixed_settings(run.settings))
    if state is not None:
        run.history = resumed_history(run, state, run.history, state["samples"], "data.sources")
        run.loader.follow(run.history)
        step = load_run(run, state).step
    for line in run.loader.report(run.settings.train.steps * run.settings.train.global_batch):
        log.info("%s", line)
    return step


def fixed_settings(settings: MidtrainSettings) -> dict[str, Any]:
    """What must not change in the middle of a run: samples would be read twice, or never, or be those held out."""
    return {
        "run.seed": settings.run.seed,
        "train.global_batch": settings.train.global_batch,
        "train.only": settings.train.only,
        "data.seq_len": settings.data.seq_len,
        "data.packing": settings.data.packing,
        "data.document_mask": settings.data.document_mask,
        "data.validation_fraction": settings.data.validation_fraction,
    }


def build(settings: MidtrainSettings, groups: Groups, device: torch.device) -> MidtrainRun:
    """Open the data, then build what every run has."""
    spec = resolve_spec(settings.model)
    loader, history = open_data(settings, spec, groups)
    every = build_run(settings, spec, groups, device, seq_len=settings.data.seq_len, only=settings.train.only)
    return MidtrainRun(**vars(every), loader=loader, history=history)


def open_data(settings: MidtrainSettings, spec: ModelSpec, groups: Groups) -> tuple[DataLoader, History]:
    """The loader, and what its sources are, as rank 0 sees them.

    A SettingsError on every rank where one of them, perhaps on another node, cannot read a source.
    """
    loader, failure = None, ""
    histories: list[Any] = [None]
    try:
        loader = DataLoader(
            settings.data,
            vocab_size=spec.vocab_size,
            seed=settings.run.seed,
            global_batch=settings.train.global_batch,
            micro_batch=settings.train.micro_batch,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
            cp_rank=groups.cp_rank,
            cp_size=groups.cp_size,
            needs_tokens=groups.is_first_stage,
            needs_labels=groups.is_last_stage,
        )
        histories = [loader.new_history() if groups.rank == 0 else None]
    except (TokenFileError, OSError) as error:
        failure = str(error)
    if failures := gather_failures(failure):
        raise SettingsError("; ".join(sorted(set(failures))))
    assert loader is not None
    dist.broadcast_object_list(histories, src=0)
    return loader, histories[0]
