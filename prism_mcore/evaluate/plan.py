"""What scoring and evaluation will do and need."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from prism_mcore.evaluate.files import shapes_of
from prism_mcore.evaluate.settings import EvaluateSettings, ScoreSettings
from prism_mcore.generate.plan import memory_of
from prism_mcore.generate.settings import GenerateSettings
from prism_mcore.model.spec import ModelSpec
from prism_mcore.plan import host, report
from prism_mcore.plan.memory import inference_bytes, num_parameters, plan_memory

if TYPE_CHECKING:
    from prism_mcore.evaluate.jobs import Job


def plan(
    settings: ScoreSettings, spec: ModelSpec, sequences: int, length: int, *, micro_batch: int, logits: bool
) -> list[Table]:
    """What --dry-run prints of checked settings, for so many sequences of one length."""
    parallel = settings.parallel
    ranks = parallel.tp * parallel.pp
    weights = max(stage.weights for stage in plan_memory(settings, spec, ranks, seq_len=length))
    needed = inference_bytes(settings, spec, micro_batch * length, logits=logits) / report.GB
    free = host.free_memory() / report.GB
    size = 4 * sum(math.prod(shape) for shape in shapes_of(sequences, length, spec.vocab_size, logits).values())
    return [
        report.facts(
            "Scoring",
            [
                ("model", f"{spec.family}, {num_parameters(spec):,} parameters in {settings.precision.dtype}"),
                ("ranks of one replica", f"{ranks} = tp {parallel.tp} x pp {parallel.pp}"),
                ("weights per rank", f"{weights / report.GB:.3g} GB"),
                ("memory per rank", f"{needed:.3g} GB; {free:.3g} GB are free on this machine"),
                ("sequences", f"{sequences:,} of {length:,} tokens, {micro_batch} at a time"),
                ("output", f"{size / report.GB:.3g} GB"),
            ],
        )
    ]


def plan_evaluation(
    settings: EvaluateSettings, spec: ModelSpec, jobs: Sequence["Job"], done: Sequence[int], lengths: Sequence[int]
) -> list[Table]:
    """What --dry-run prints of an evaluation; done: samples of each job that are there."""
    needed = evaluation_bytes(settings, spec, jobs, lengths) / report.GB
    rows = []
    for job, there in zip(jobs, done, strict=True):
        sampling, published = job.sampling, f"/{job.task.rows}" if job.task.rows else ""
        rows.append(
            (
                job.task.name,
                f"{len(job.problems):,}{published}",
                f"{sampling.samples}",
                f"{there:,}/{len(job.places):,}",
                f"{sampling.max_tokens:,}",
                f"{sampling.temperature:g}",
                f"{sampling.top_p:g}",
            )
        )
    columns = ("task", "questions", "samples", "done", "max tokens", "T", "top-p")
    facts = [
        ("model", f"{spec.family}, {num_parameters(spec):,} parameters in {settings.precision.dtype}"),
        ("ranks of one replica", f"{settings.parallel.tp}"),
        ("memory per rank", f"{needed:.3g} GB; {host.free_memory() / report.GB:.3g} GB are free on this machine"),
        ("prompts", f"{min(lengths):,} to {max(lengths):,} tokens"),
        *((job.task.name, f"settings from {job.task.source}") for job in jobs),
    ]
    return [report.facts("Evaluation", facts), report.numbers("", columns, rows)]


def evaluation_bytes(settings: EvaluateSettings, spec: ModelSpec, jobs: Sequence["Job"], lengths: Sequence[int]) -> int:
    """Bytes that a rank needs at least: of the task with the longest samples."""
    how = settings.model_dump(include={"generate", "parallel", "precision", "kernels"})
    longest = max(jobs, key=lambda job: job.sampling.max_tokens).sampling
    return memory_of(GenerateSettings(**how, sampling=longest), spec, lengths)
