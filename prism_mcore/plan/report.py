"""What a run will need, printed for --dry-run: settings, notes, and tables that fit 80 columns."""

from collections.abc import Iterable, Sequence

from rich.table import Table

from prism_mcore.config import ProgramSettings, dump
from prism_mcore.console import say, show
from prism_mcore.model.settings import BuildSettings
from prism_mcore.model.spec import ModelSpec
from prism_mcore.parallel import data_parallel_size
from prism_mcore.plan.memory import StageMemory, num_parameters
from prism_mcore.plan.throughput import PEAK_FLOPS, gpu_hours

MFU = 0.4  # of the bf16 peak: what the hours below assume
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
    shards, replicas = dp // parallel.optimizer_instances, parallel.optimizer_instances
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
    """GB of one rank of each pipeline stage."""
    columns = ("stage", "layers", "params", "weights", "gradients", "optimizer", "activations", "loss", "total")
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
    return numbers("Memory per rank, GB (without CUDA context, NCCL and fragmentation: some 8 GB)", columns, rows)


def hours(flops: float) -> Table:
    """Hours of one GPU of each kind for so many model FLOPs, the slowest first."""
    labels = {"H100": "H100 SXM"}
    rows = []
    for name, peak in sorted(PEAK_FLOPS.items(), key=lambda item: (item[1], item[0])):
        time = gpu_hours(flops, MFU, peak)
        rows.append([labels.get(name, name), f"{peak / 1e12:.0f}", f"{time:,.1f}" if time >= 0.1 else f"{time:.2g}"])
    return numbers(f"GPU hours at {MFU:.0%} MFU", ("GPU", "bf16 TFLOP/s", "hours"), rows)
