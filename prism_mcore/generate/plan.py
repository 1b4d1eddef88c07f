"""What a generation will do and need."""

import math
from collections.abc import Sequence

from rich.table import Table

from prism_mcore.generate.settings import GenerateSettings
from prism_mcore.model.spec import ModelSpec
from prism_mcore.plan import host, report
from prism_mcore.plan.memory import cache_bytes, inference_bytes, kept_weight_bytes, num_parameters


def plan(settings: GenerateSettings, spec: ModelSpec, lengths: Sequence[int], done: int) -> list[Table]:
    """What --dry-run prints of checked settings, for prompts of these lengths of which `done` samples are there."""
    sampling = settings.sampling
    needed, free = memory_of(settings, spec, lengths) / report.GB, host.free_memory() / report.GB
    rows = [
        ("model", f"{spec.family}, {num_parameters(spec):,} parameters in {settings.precision.dtype}"),
        ("ranks of one replica", f"{settings.parallel.tp}"),
        ("memory per rank", f"{needed:.3g} GB; {free:.3g} GB are free on this machine"),
        ("prompts", f"{len(lengths):,} of {min(lengths):,} to {max(lengths):,} tokens"),
        ("samples", f"{len(lengths) * sampling.samples:,} of at most {sampling.max_tokens:,} tokens"),
        ("running at once", f"at most {settings.generate.slots:,} per replica"),
    ]
    if done:
        rows.append(("done before", f"{done:,} samples"))
    return [report.facts("Generation", rows)]


def memory_of(settings: GenerateSettings, spec: ModelSpec, lengths: Sequence[int]) -> int:
    """Bytes that a rank needs at least: weights, a prefill, and the caches that were asked for, or of one sample."""
    fixed, per_token = cache_bytes(spec, settings.parallel.tp, 2 if settings.precision.dtype == "bf16" else 4)
    longest = min(max(lengths) + settings.sampling.max_tokens, spec.max_positions)
    asked = settings.generate.cache_gb
    caches = fixed + longest * per_token if asked is None else asked * report.GB
    prefill = max(max(lengths), min(sum(lengths), settings.generate.prefill_tokens))
    return math.ceil(inference_bytes(settings, spec, prefill) + kept_weight_bytes(settings, spec) + caches)
