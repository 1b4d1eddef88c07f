"""What a run will need, printed for --dry-run: settings, notes, and tables that fit 80 columns."""

from collections.abc import Iterable, Sequence

from rich.table import Table

from prism_mcore.config import ProgramSettings, dump
from prism_mcore.console import say, show
from prism_mcore.model.settings import BuildSettings
from prism_mcore.model.spec import ModelSpec
from prism_mcore.parallel import data_parallel_size
from prism_mcore.plan.hardware import GPUS, H100
from prism_mcore.plan.memory import StageMemory, num_parameters
from prism_mcore.plan.published import Published
from prism_mcore.plan.search import Plan
from prism_mcore.plan.throughput import (
    TUNED,
    TYPICAL,
    Layout,
    StepTime,
    step_time,
)

GB = 1e9


def print_plan(settings: ProgramSettings, notes: Sequence[str], tables: Iterable[Table]) -> None:
    """Print a program's settings, what its check notes, and what it will need."""
    say("Settings")
    say(dump(settings))  # long lines are the terminal's to wrap: YAML that is cut at a column is no YAML
    for note in notes:
        say(f"note: {note}")
    for table in tables:
        show(table)


def facts(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Names and what belongs to them."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def numbers(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Columns of numbers under their names, as narrow as they can be."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def layout(settings: BuildSettings, spec: ModelSpec, world_size: int, micro_batches: str) -> Table:
    """The model, and how ranks share it."""
    parallel, dp = settings.parallel, data_parallel_size(settings.parallel, world_size)
    kinds = {"attention": spec.pattern.count("*"), "MLP": spec.pattern.count("-"), "Mamba-2": spec.pattern.count("M")}
    shards, replicas = dp * parallel.cp // parallel.optimizer_instances, parallel.optimizer_instances
    return facts(
        "Model and layout",
        [
            ("architecture", spec.family),
            ("parameters", f"{num_parameters(spec):,}"),
            ("sub-layers", ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)),
            ("ranks", f"{world_size} = tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} x dp {dp}"),
            ("pipeline chunks", f"{parallel.vpp} per stage"),
            ("optimizer", f"sharded over {shards} ranks" + (f", {replicas} replicas" if replicas > 1 else "")),
            ("micro-batches per step", micro_batches),
        ],
    )


def memory(stages: Sequence[StageMemory]) -> Table:
    """GB of one rank of each pipeline stage, and above it the largest share of a save."""
    columns = (
        "stage",
        "layers",
        "params",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "loss",
        "total",
    )
    rows = [
        [
            f"{stage.stage}",
            f"{stage.layers}",
            f"{stage.parameters / 1e9:.3g} B",
            *(
                f"{size / GB:.3g}"
                for size in (
                    stage.weights,
                    stage.gradients,
                    stage.optimizer,
                    stage.activations,
                    stage.loss,
                    stage.total,
                )
            ),
        ]
        for stage in stages
    ]
    saved = max(stage.saved for stage in stages) / GB
    title = (
        "Memory per rank, GB (without CUDA context, NCCL and fragmentation: some 8 GB)\n"
        f"A save: {saved:.3g} GB a rank on the disk, and in host memory while it is written beside training"
    )
    return numbers(title, columns, rows)


def throughput(spec: ModelSpec, layout: Layout, tokens: int) -> list[Table]:
    """Predicted rate and hours of a run of so many tokens on each kind of GPU, and what an H100's step is made of."""
    rows = []
    for gpu in GPUS.values():
        rate = step_time(spec, layout, gpu).rate
        low, high = (tokens / (share * rate) / 3600 for share in (TUNED, TYPICAL))
        rows.append([gpu.name, f"{TYPICAL * rate:,.0f} to {TUNED * rate:,.0f}", f"{low:,.3g} to {high:,.3g}"])
    title = "Predicted: typical to tuned (by formula, nothing was measured)"
    return [
        numbers(title, ("GPU", "tokens/s a GPU", "GPU hours"), rows),
        step(step_time(spec, layout, H100)),
    ]


def step(time: StepTime) -> Table:
    """What a step is made of, the largest first."""
    terms = sorted(time.terms.items(), key=lambda term: -term[1])
    rows = [[name, f"{seconds:.3g}", f"{seconds / time.total:.1%}"] for name, seconds in terms]
    title = f"A step, bound by {time.bound_by}: {time.total / TUNED:.3g} to {time.total / TYPICAL:.3g} s"
    return numbers(title, ("what", "s by formula", "share"), rows)


def plans(title: str, found: Sequence[Plan]) -> Table:
    """Layouts, the fastest first."""
    rows = []
    for plan in found:
        at = plan.layout
        degrees = {"tp": at.tp, "pp": at.pp, "vpp": at.vpp, "dp": at.dp, "micro": at.micro_batch}
        degrees["replicas"] = at.optimizer_instances
        layout = " ".join(f"{name} {n}" for name, n in degrees.items() if n > 1)
        fp8, recompute = "fp8" if at.fp8 else "-", "+".join(sorted(at.recompute)) or "-"
        rate = f"{TYPICAL * plan.time.rate:,.0f} to {TUNED * plan.time.rate:,.0f}"
        rows.append([layout, fp8, recompute, f"{plan.memory / GB:.0f}", rate])
    return numbers(title, ("layout", "fp8", "recompute", "GB", "tokens/s a GPU"), rows)


def published(rows: Sequence[Published]) -> Table:
    """Published runs and what the formula says of them."""
    cells = [[row.name, row.kind, f"{row.measured:,.0f}", f"{row.predicted:,.0f}", f"{row.error:+.1%}"] for row in rows]
    return numbers("Tokens per second and GPU", ("run", "kind", "published", "predicted", "error"), cells)
