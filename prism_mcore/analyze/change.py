"""`launch/analyze.py weights`: the tables and pictures of what changed, in a folder, and what of it a person reads."""

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from prism_mcore.analyze.sources import Weights, require_same
from prism_mcore.analyze.tables import Row, write_csv, write_parquet
from prism_mcore.analyze.weights import COLUMNS, TensorChange, by_class, compare, cosines
from prism_mcore.checkpoint.durable import write_atomically
from prism_mcore.checkpoint.folder import read_state
from prism_mcore.console import progress, show

CONTROL = "control"
METRICS = "metrics.jsonl"


def analyze_weights(
    old: Path, new: list[Path], out: Path, *, control: Path | None = None, master: bool = False
) -> list[Row]:
    """Write the tables and pictures of every new model against the old one; the lines of modules.csv.

    Raises ExchangeError, before anything is written, for what cannot be read and for models that are not alike.
    """
    paths = [*new, *([control] if control else [])]
    models = labels(new) + ([CONTROL] if control else [])
    with ExitStack() as opened:
        before = opened.enter_context(Weights(old, master=master))
        after = [opened.enter_context(Weights(path, master=master)) for path in paths]
        require_same([before, *after])
        size = before.bytes + sum(model.bytes for model in after)
        columns = (TextColumn("comparing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with progress(*columns) as shows:
            bar = shows.add_task("", total=size)
            tensors = list(compare(before, after, lambda done: shows.advance(bar, done)))
        rates = {model: summed_lr(one) for model, one in zip(models, after, strict=True)}
    out.mkdir(parents=True, exist_ok=True)
    rows = [_line(tensor, which, model) for which, model in enumerate(models) for tensor in tensors]
    lines = [{"model": model} | line for which, model in enumerate(models) for line in by_class(tensors, which)]
    write_csv(out / "weights.csv", [tensor.row() for tensor in tensors], COLUMNS)
    write_parquet(out / "weights.parquet", rows)
    write_csv(out / "modules.csv", lines)
    pairs = [{"first": models[c["first"]], "second": models[c["second"]]} | _numbers(c) for c in cosines(tensors)]
    write_csv(out / "cosines.csv", pairs, ("first", "second", "pooled", "mean"))
    compared = {"old": str(old), "new": dict(zip(models, map(str, paths), strict=True)), "master": master}
    write_atomically(out / "weights.json", json.dumps(compared | {"summed_lr": rates}, indent=1) + "\n")
    _draw(out, lines, [tensor.row() for tensor in tensors], models)
    return lines


def labels(paths: list[Path]) -> list[str]:
    """A short name for each model, all different: the last parts of its path that tell it from the others."""
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, start=1)]


def summed_lr(model: Weights) -> float | None:
    """The learning rates of all steps of the run that a checkpoint is of; None where no run is known."""
    if model.export is None:
        return None
    folder = model.export.checkpoint
    metrics = next((up / METRICS for up in folder.parents[:2] if (up / METRICS).is_file()), None)
    if metrics is None:
        return None
    last = read_state(folder)["step"]
    records = (json.loads(line) for line in metrics.read_text().splitlines())
    return math.fsum(record["lr"] for record in records if record["step"] <= last)


def shown(lines: list[Row]) -> None:
    """The totals and modules of every model as a table."""
    table = Table("model", "module", "||d||/||w||", "> 1% of itself", "> 1% of RMS", "bf16 the same", "one bf16 step")
    for line in lines:
        if line["level"] in ("total", "module"):
            shares = ("changed_1pct", "changed_rms_1pct", "identical_bf16", "one_step_bf16")
            cells = [f"{100 * line[f'pooled_{name}']:.2f}%" for name in shares]
            table.add_row(line["model"], line["name"], f"{line['pooled_relative_l2']:.4g}", *cells)
    if all(line["model"] != CONTROL for line in lines):
        table.caption = "without a control (--control) a share says little: other training changes as many weights"
    show(table)


def _line(tensor: TensorChange, which: int, model: str) -> dict[str, Any]:
    one_step = tensor.changes[which].shares()["one_step_bf16"]
    return {"model": model} | tensor.row(which) | {"one_step_bf16": one_step}


def _numbers(cosine: Row) -> dict[str, Any]:
    return {"pooled": cosine["pooled"], "mean": cosine["mean"]}


def _draw(out: Path, lines: list[Row], rows: list[Row], models: list[str]) -> None:
    from prism_mcore.analyze.pictures import draw_layers, draw_modules, draw_thresholds  # matplotlib takes a second

    draw_modules(out / "modules.png", lines, models)
    draw_thresholds(out / "thresholds.png", lines, models)
    draw_layers(out / "layers.png", rows)
