"""What a mid-training run will need, as --dry-run prints it."""

from rich.table import Table

from prism_mcore.model.flops import flops_per_token
from prism_mcore.model.spec import ModelSpec
from prism_mcore.plan import report
from prism_mcore.plan.memory import StageMemory, plan_memory
from prism_mcore.plan.throughput import Layout
from prism_mcore.train.settings import MidtrainSettings


def plan(settings: MidtrainSettings, spec: ModelSpec, world_size: int) -> list[Table]:
    """Layout, memory, work, predicted rate and hours of checked settings."""
    seq_len, train, isolated = settings.data.seq_len, settings.train, settings.data.document_mask
    step_tokens = train.global_batch * seq_len
    tokens = step_tokens * train.steps
    model, hardware = flops_per_token(spec, seq_len), flops_per_token(spec, seq_len, train.recompute)
    work = report.facts(
        "Work",
        [
            ("tokens per step", f"{step_tokens:,}"),
            ("tokens of the run", f"{tokens:,}"),
            # How long isolated documents are, the data says: metrics.jsonl counts them.
            ("model FLOPs per token", f"{'at most ' * isolated}{model:.4g} forward and backward"),
            ("with recompute", f"{hardware:.4g} ({hardware / model - 1:+.0%})"),
            ("model FLOPs of the run", f"{'at most ' * isolated}{model * tokens:.4g}"),
        ],
    )
    return [
        report.layout(settings, spec, world_size, f"{settings.num_micro_batches(world_size)}"),
        report.memory(memory_of(settings, spec, world_size)),
        work,
        *report.throughput(spec, layout_of(settings, world_size), tokens),
    ]


def layout_of(settings: MidtrainSettings, world_size: int) -> Layout:
    """What predicting a step's time reads of checked settings."""
    parallel, precision, train = settings.parallel, settings.precision, settings.train
    return Layout(
        gpus=world_size,
        seq_len=settings.data.seq_len,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        tp=parallel.tp,
        pp=parallel.pp,
        vpp=parallel.vpp,
        cp=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        recompute=frozenset(train.recompute),
        fp8=precision.fp8 != "off",
        fp8_bf16_ends=precision.fp8_bf16_ends,
        optimizer_instances=parallel.optimizer_instances,
    )


def memory_of(settings: MidtrainSettings, spec: ModelSpec, world_size: int) -> list[StageMemory]:
    """The memory of one rank of each pipeline stage."""
    return plan_memory(
        settings,
        spec,
        world_size,
        seq_len=settings.data.seq_len,
        micro_batch=settings.train.micro_batch,
        micro_batches=settings.num_micro_batches(world_size),
        recompute=settings.train.recompute,
        masters=settings.optimizer.masters,
    )
