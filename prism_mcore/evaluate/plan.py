"""What scoring will do and need."""

import math

from rich.table import Table

from prism_mcore.evaluate.files import shapes_of
from prism_mcore.evaluate.settings import ScoreSettings
from prism_mcore.model.spec import ModelSpec
from prism_mcore.plan import report
from prism_mcore.plan.host import free_memory
from prism_mcore.plan.memory import inference_bytes, num_parameters, plan_memory


def plan(
    settings: ScoreSettings, spec: ModelSpec, sequences: int, length: int, *, micro_batch: int, logits: bool
) -> list[Table]:
    """What --dry-run prints of checked settings, for so many sequences of one length."""
    parallel = settings.parallel
    ranks = parallel.tp * parallel.pp
    weights = max(stage.weights for stage in plan_memory(settings, spec, ranks, seq_len=length))
    needed = inference_bytes(settings, spec, micro_batch * length, logits=logits) / report.GB
    size = 4 * sum(math.prod(shape) for shape in shapes_of(sequences, length, spec.vocab_size, logits).values())
    return [
        report.facts(
            "Scoring",
            [
                ("model", f"{spec.family}, {num_parameters(spec):,} parameters in {settings.precision.dtype}"),
                ("ranks of one replica", f"{ranks} = tp {parallel.tp} x pp {parallel.pp}"),
                ("weights per rank", f"{weights / report.GB:.3g} GB"),
                ("memory per rank", f"{needed:.3g} GB; {free_memory() / report.GB:.3g} GB are free on this machine"),
                ("sequences", f"{sequences:,} of {length:,} tokens, {micro_batch} at a time"),
                ("output", f"{size / report.GB:.3g} GB"),
            ],
        )
    ]
