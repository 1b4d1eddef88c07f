"""The mid-training run: fetch, backward, update, log, validate, save, in that order."""

import contextlib
import logging

from prism_mcore.exit_codes import DONE, STOPPED_BY_SIGNAL
from prism_mcore.train.metrics import Metrics
from prism_mcore.train.midtrain import MidtrainRun, build, resume, save
from prism_mcore.train.optimizer import update
from prism_mcore.train.run import carry_out, collection_between_steps, due
from prism_mcore.train.schedule import learning_rate
from prism_mcore.train.settings import MidtrainSettings
from prism_mcore.train.signals import Signals
from prism_mcore.train.step import backward
from prism_mcore.train.validation import validate

log = logging.getLogger(__name__)


def run(settings: MidtrainSettings) -> int:
    """Mid-train to `train.steps`, resuming from the newest checkpoint of the run; returns one of exit_codes.py."""
    return carry_out(
        settings,
        build=lambda groups, device, opened: build(settings, groups, device),
        train=lambda started: train(started),
    )


def train(run: MidtrainRun) -> int:
    """The loop."""
    settings, steps = run.settings, run.settings.train.steps
    start = resume(run)
    batches = run.loader.steps(start)
    with (
        Metrics(run, start) as metrics,
        Signals() as signals,
        collection_between_steps() as collect,
        contextlib.closing(batches),
    ):
        if due(start, settings.train.validate_every, steps) and metrics.lacks_validation(start):
            metrics.log_validation(start, held_out_losses(run))
        for step in range(start + 1, steps + 1):
            metrics.start_step()
            batch = next(batches)
            metrics.mark("data")
            stats = backward(
                run.chunks, run.optimizer, batch, run.groups, len(run.loader.sources), stop=lambda: signals.received
            )
            metrics.mark("forward_backward")
            lr = learning_rate(step, settings.optimizer, steps)
            if run.guard.admits(step, stats, batch):
                update(run.optimizer, stats.grad_norm, lr)
            metrics.mark("update")
            metrics.log(step, batch, stats, lr)

            if due(step, settings.train.validate_every, steps):
                metrics.log_validation(step, held_out_losses(run))
            if stats.stop or due(step, settings.checkpoint.every, steps):
                save(run, step)
            run.checkpoints.poll()
            collect()
            if stats.stop and step < steps:
                log.info("stopped by a signal after step %d; the same command resumes from here", step)
                break
    run.checkpoints.wait()
    return STOPPED_BY_SIGNAL if start < steps and step < steps else DONE


def held_out_losses(run: MidtrainRun) -> dict[str, float]:
    """Validation loss in nats per token, as `loss/<domain>`; in FP8 also that of the weights without it."""
    train = run.settings.train
    kinds: dict[str, contextlib.AbstractContextManager] = {"loss": contextlib.nullcontext()}
    if run.settings.precision.fp8 != "off":
        kinds["loss_without_fp8"] = run.models[0].without_fp8()
    losses: dict[str, float] = {}
    for kind, precision in kinds.items():
        with precision:
            domains = validate(run.chunks, run.loader, run.groups, train.validate_batches * train.global_batch)
        losses |= {f"{kind}/{domain}": loss for domain, loss in domains.items()}
    return losses
