"""What a run reports: metrics.jsonl, tensorboard, one console line per step."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Self, TextIO

import numpy as np
import torch

from prism_mcore.agree import all_ranks
from prism_mcore.checkpoint.folder import VALIDATION_FILE
from prism_mcore.console import say
from prism_mcore.model.flops import flops_of_documents
from prism_mcore.plan.throughput import peak_flops
from prism_mcore.train.sinks import Sink, open_sinks

if TYPE_CHECKING:
    from prism_mcore.batch import PackedBatch
    from prism_mcore.train.midtrain import MidtrainRun
    from prism_mcore.train.settings import LoopSettings
    from prism_mcore.train.step import StepStats

STEPS_FILE = "metrics.jsonl"

log = logging.getLogger(__name__)


class Records:
    """JSON lines and tensorboard in a run's folder, and other services; on rank 0, and quietly nothing elsewhere.

    start: the step resumed from; what the files have beyond it is dropped.
    """

    def __init__(self, settings: LoopSettings, files: Sequence[str], start: int, *, rank: int):
        self._files: dict[str, TextIO] = {}
        self._sinks: list[Sink] = []
        self._last: dict[str, int] = {}  # the step of each file's last record when it was opened
        self._tensorboard: Any = None
        if rank == 0:
            self._open(settings.run_dir, files, start, settings.log.tensorboard)
            self._sinks = open_sinks(settings)

    def _open(self, folder: Path, files: Sequence[str], start: int, tensorboard: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            self._last[name] = truncate_after(folder / name, start)
            self._files[name] = open(folder / name, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def lacks(self, file: str, step: int) -> bool:
        """Is there no record of this step yet? Every rank asks, and gets rank 0's answer."""
        return not all_ranks(not self._files or self._last[file] == step)

    def __bool__(self) -> bool:
        """Is anything written here?"""
        return bool(self._files)

    def write(self, file: str, record: dict[str, Any]) -> None:
        """Append an object, which has a `step`; NaN and Inf become null."""
        finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
        self._files[file].write(json.dumps(finite) + "\n")
        if self._tensorboard is not None:
            for key, value in record.items():
                if key != "step":
                    self._tensorboard.add_scalar(key, value, record["step"])
        for sink in self._sinks:
            sink.log({key: value for key, value in finite.items() if value is not None}, step=record["step"])

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        for sink in self._sinks:
            sink.finish()


class StepClock:
    """Times a step and its parts, in seconds of `timer`; the same part may come several times."""

    def __init__(self, timer: Callable[[], float] = perf_counter) -> None:
        self.timer = timer
        self.start()

    def start(self) -> None:
        """A step begins."""
        self._begun = self._last = self.timer()
        self.parts: dict[str, float] = {}  # time/<part>_s

    def mark(self, part: str) -> None:
        """The named part of the step ends here."""
        now = self.timer()
        name = f"time/{part}_s"
        self.parts[name] = self.parts.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def step_s(self) -> float:
        return self.timer() - self._begun


class Metrics:
    """Times the parts of each step and writes it down; on rank 0, and quietly nothing elsewhere.

    metrics.jsonl has one object per step; the keys of `log` are in its docstring. validation.jsonl has one object per
    validation: step, validation/loss/<domain>. On resume both lose what lies beyond the step resumed from.
    """

    def __init__(self, run: MidtrainRun, start: int):
        settings = run.settings
        self.steps, self.every = settings.train.steps, settings.log.every
        self.tokens_per_step = settings.train.global_batch * settings.data.seq_len
        self.spec = run.spec
        self.devices_per_replica = run.groups.world_size // run.groups.dp_size
        self.peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        self.domains = run.loader.domains
        self._step_times: deque[float] = deque(maxlen=20)
        files = (STEPS_FILE, VALIDATION_FILE)
        self.records = Records(settings, files, start, rank=run.groups.rank)
        self.clock = StepClock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.records.close()

    def start_step(self) -> None:
        """A step begins."""
        self.clock.start()

    def mark(self, part: str) -> None:
        """The named part of the step ends here; it becomes time/<part>_s."""
        self.clock.mark(part)

    def log(self, step: int, batches: Sequence[PackedBatch], stats: StepStats, lr: float) -> None:
        """Write down a step: step, loss (nats per token), loss/<domain>, grad_norm, lr, tokens (so far), time/step_s,
        time/<part>_s, throughput/tokens_per_s (all devices), throughput/tflops (each device of rank 0's replica: the
        model's FLOPs over the documents of its micro-batches, isolated ones each on its own), throughput/mfu (where the
        peak is known), memory/peak_gb (of rank 0). NaN and Inf become null.
        """
        step_s = self.clock.step_s
        self._step_times.append(step_s)
        if not self.records:
            return
        domains = domain_losses(self.domains, stats)
        lengths = np.concatenate([batch.document_lengths for batch in batches])
        flops = flops_of_documents(self.spec, lengths) / step_s / self.devices_per_replica
        record = {
            "step": step,
            "loss": stats.loss,
            **{f"loss/{domain}": loss for domain, loss in domains.items()},
            "grad_norm": stats.grad_norm,
            "lr": lr,
            "tokens": step * self.tokens_per_step,
            "time/step_s": step_s,
            **self.clock.parts,
            "throughput/tokens_per_s": self.tokens_per_step / step_s,
            "throughput/tflops": flops / 1e12,
            **({"throughput/mfu": flops / self.peak} if self.peak else {}),
            "memory/peak_gb": peak_memory_gb(),
        }
        self.records.write(STEPS_FILE, record)
        if step % self.every == 0 or step == self.steps:
            say(self._line(record, domains), stderr=True)

    def lacks_validation(self, start: int) -> bool:
        """Is there no validation of what the run starts from yet? Every rank asks."""
        return self.records.lacks(VALIDATION_FILE, start)

    def log_validation(self, step: int, losses: dict[str, float]) -> None:
        """Write down the validation after a step: nats per token by `loss/<domain>`; nothing without held-out text."""
        if not (self.records and losses):
            return
        record = {"step": step, **{f"validation/{name}": loss for name, loss in losses.items()}}
        self.records.write(VALIDATION_FILE, record)
        listed = " ".join(
            f"{name} {loss:.4f}" if math.isfinite(loss) else f"{name} no label"
            for name, loss in ((name.removeprefix("loss/"), loss) for name, loss in losses.items())
        )
        say(f"step {step:>{len(str(self.steps))}}/{self.steps} | validation {listed}", stderr=True)

    def _line(self, record: dict[str, Any], domains: dict[str, float]) -> str:
        step = record["step"]
        parts = [
            f"step {step:>{len(str(self.steps))}}/{self.steps}",
            f"loss {record['loss']:.4f}" if domains else "no label counts",
            " ".join(f"{domain} {loss:.3f}" for domain, loss in domains.items()) if len(domains) > 1 else "",
            f"lr {record['lr']:.2e}",
            f"grad {record['grad_norm']:.3f}" if domains else "",
            f"{short(record['throughput/tokens_per_s'])} tok/s",
            f"{record['throughput/tflops']:.3g} TFLOP/s",
            f"MFU {100 * record['throughput/mfu']:.1f}%" if self.peak else "",
            f"ETA {clock_text((self.steps - step) * sum(self._step_times) / len(self._step_times))}",
        ]
        return " | ".join(part for part in parts if part)


def domain_losses(domains: list[str], stats: StepStats) -> dict[str, float]:
    """Nats per token of each domain that had tokens in this step; a domain may have several sources."""
    nats: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for domain, loss, count in zip(domains, stats.source_loss, stats.source_tokens, strict=True):
        if count:
            nats[domain] = nats.get(domain, 0.0) + loss * count
            tokens[domain] = tokens.get(domain, 0) + count
    return {domain: nats[domain] / tokens[domain] for domain in nats}


def truncate_after(path: Path, step: int) -> int:
    """Drop the records of a .jsonl file that are beyond `step`, and lines that are no records, as a crash leaves them.

    Returns the step of the last record that stays, -1 without any.
    """
    last, kept, damaged = -1, [], 0
    if not path.exists():
        return last
    for line in path.read_bytes().splitlines():
        try:
            of_step = json.loads(line.decode("utf-8"))["step"]
            if of_step <= step:
                kept.append(line + b"\n")
                last = of_step
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):  # not text, not JSON, not a record
            damaged += 1
    if damaged:
        log.warning("%s: dropped %d lines that are no records of steps", path, damaged)
    temporary = path.with_name(f".tmp_{path.name}")
    temporary.write_bytes(b"".join(kept))
    os.replace(temporary, path)
    return last


def peak_memory_gb() -> float:
    """The most memory this rank has had: of the device, or resident in the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def clock_text(seconds: float) -> str:
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}"
