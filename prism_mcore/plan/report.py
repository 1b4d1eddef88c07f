"""What a run will need, printed: settings, layout, memory per rank, tokens, FLOPs, GPU-hours."""

from rich.console import Console
from rich.table import Table

from prism_mcore.config import Settings, dump, num_micro_batches
from prism_mcore.console import plain, styled
from prism_mcore.model.flops import flops_per_token
from prism_mcore.model.spec import ModelSpec
from prism_mcore.parallel import data_parallel_size
from prism_mcore.plan.memory import cache_bytes, num_parameters, plan_memory
from prism_mcore.plan.throughput import PEAK_FLOPS, gpu_hours

MFU = 0.4  # of the bf16 peak: what the time below assumes
GB = 1e9


def print_plan(settings: Settings, spec: ModelSpec, world_size: int, notes: list[str], console: Console) -> None:
    """Print the plan of validated settings on `world_size` GPUs; starts nothing."""
    console.print(styled("Settings", "bold"))
    console.print(plain(dump(settings)))
    for note in notes:
        console.print(plain(f"note: {note}"))
    for table in (_layout(settings, spec, world_size), _memory(settings, spec, world_size), _work(settings, spec)):
        console.print(table)


def print_rl_plan(settings: Settings, spec: ModelSpec, world_size: int, notes: list[str], console: Console) -> None:
    """Print the plan of validated RL settings on `world_size` GPUs; starts nothing."""
    console.print(styled("Settings", "bold"))
    console.print(plain(dump(settings)))
    for note in notes:
        console.print(plain(f"note: {note}"))
    packed = as_training(settings, world_size)
    for table in (
        _layout(packed, spec, world_size),
        _memory(packed, spec, world_size),
        _rollout_memory(settings, spec, world_size),
        _rollout_work(settings, spec),
    ):
        console.print(table)


def as_training(settings: Settings, world_size: int) -> Settings:
    """Mid-training settings whose step is one micro-batch of an RL run's updates on each rank, for planning memory."""
    dp = data_parallel_size(settings.parallel, world_size)
    return settings.model_copy(
        update={
            "data": settings.data.model_copy(update={"seq_len": settings.rl.context}),
            "train": settings.train.model_copy(update={"global_batch": settings.train.micro_batch * dp}),
        }
    )


def _rollout_memory(settings: Settings, spec: ModelSpec, world_size: int) -> Table:
    tp, element = settings.parallel.tp, 2 if settings.precision.dtype == "bf16" else 4
    per_sequence, per_token = cache_bytes(spec, tp, element)
    table = _table("Memory of rollouts per rank", "", "")
    if settings.rl.kl_coefficient:
        shards = data_parallel_size(settings.parallel, world_size) // settings.parallel.optimizer_instances
        table.add_row("reference policy", f"{4 * num_parameters(spec) / tp / shards / GB:.3g} GB")
    table.add_row("cache of a sequence", f"{per_sequence / 2**20:.3g} MiB + {per_token / 2**10:.3g} KiB a token")
    whole = per_sequence + settings.rl.context * per_token
    table.add_row(f"at rl.context={settings.rl.context:,} tokens", f"{whole / GB:.3g} GB")
    return table


def _rollout_work(settings: Settings, spec: ModelSpec) -> Table:
    rl, sampling = settings.rl, settings.sampling
    count = rl.prompts_per_step * sampling.samples
    model = flops_per_token(spec, rl.context)
    table = _table("Work", "", "")
    table.add_row("rollouts per step", f"{rl.prompts_per_step} prompts x {sampling.samples} = {count:,}")
    table.add_row("response tokens per step", f"at most {count * sampling.max_tokens:,}")
    table.add_row("rollouts of the run", f"{count * settings.train.steps:,}")
    scoring = 1 / 3 if rl.kl_coefficient else 0.0  # the reference's forward pass
    table.add_row("model FLOPs per token", f"{model * (1 + 1 / 3 + scoring):.4g} generated, scored and trained on")
    return table


def _layout(settings: Settings, spec: ModelSpec, world_size: int) -> Table:
    parallel, dp = settings.parallel, data_parallel_size(settings.parallel, world_size)
    kinds = {"attention": spec.pattern.count("*"), "MLP": spec.pattern.count("-"), "Mamba-2": spec.pattern.count("M")}
    table = _table("Model and layout", "", "")
    table.add_row("architecture", spec.family)
    table.add_row("parameters", f"{num_parameters(spec):,}")
    table.add_row("sub-layers", ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count))
    table.add_row("ranks", f"{world_size} = tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} x dp {dp}")
    table.add_row("pipeline chunks", f"{parallel.vpp} per stage")
    shards, replicas = dp // parallel.optimizer_instances, parallel.optimizer_instances
    table.add_row("optimizer", f"cut over {shards} ranks" + (f", {replicas} replicas" if replicas > 1 else ""))
    table.add_row("micro-batches per step", f"{num_micro_batches(settings, world_size)}")
    return table


def _memory(settings: Settings, spec: ModelSpec, world_size: int) -> Table:
    columns = ("stage", "sub-layers", "parameters", "weights", "gradients", "optimizer", "activations", "loss", "total")
    table = _table("Memory per rank, GB (without CUDA context, NCCL and fragmentation: some 8 GB)", *columns)
    for stage in plan_memory(settings, spec, world_size):
        sizes = (stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.loss, stage.total)
        table.add_row(
            str(stage.stage), str(stage.layers), f"{stage.parameters:,}", *(f"{size / GB:.3g}" for size in sizes)
        )
    return table


def _work(settings: Settings, spec: ModelSpec) -> Table:
    seq_len, train = settings.data.seq_len, settings.train
    step_tokens = train.global_batch * seq_len
    tokens = step_tokens * train.steps
    model, hardware = flops_per_token(spec, seq_len), flops_per_token(spec, seq_len, train.recompute)
    table = _table("Work", "", "")
    table.add_row("tokens per step", f"{step_tokens:,}")
    table.add_row("tokens of the run", f"{tokens:,}")
    table.add_row("model FLOPs per token", f"{model:.4g} forward and backward")
    table.add_row("with recompute", f"{hardware:.4g} ({hardware / model - 1:+.0%})")
    table.add_row("model FLOPs of the run", f"{model * tokens:.4g}")
    for name, peak in PEAK_FLOPS.items():
        hours = gpu_hours(model * tokens, MFU, peak)
        table.add_row(f"{name} hours at {MFU:.0%} MFU", f"{hours:,.1f}" if hours >= 0.1 else f"{hours:.2g}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 or not column else "right")
    return table
