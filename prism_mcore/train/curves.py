"""The picture of a run: loss by domain, validation, learning rate, gradient norm."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from prism_mcore.train.metrics import STEPS_FILE, VALIDATION_FILE

DOMAIN = "loss/"
VALIDATION = "validation/loss/"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a line that is being written is left out. ValueError for another that is none."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line.decode("utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
    return records


def plot_run(run_dir: Path, marks: dict[str, int] | None = None) -> Path:
    """Draw <run_dir>/curves.png from the run's metrics; marks: text -> step, drawn as vertical lines.

    Raises FileNotFoundError where the run has no metrics yet.
    """
    steps = read_records(run_dir / STEPS_FILE)
    if not steps:
        raise FileNotFoundError(f"{run_dir / STEPS_FILE} has no steps; give the folder of a run, such as runs/demo")
    validation = read_records(run_dir / VALIDATION_FILE)
    figure, (loss, other) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    _plot_losses(loss, steps, validation)
    _plot_optimizer(other, steps)
    for axes in (loss, other):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        for text, step in (marks or {}).items():
            axes.axvline(step, color="grey", linestyle=":", linewidth=1)
            axes.text(step, axes.get_ylim()[1], f" {text}", color="grey", fontsize=8, va="top")
    tokens = steps[-1]["tokens"]
    figure.suptitle(f"{run_dir.name}: {len(steps):,} steps, {tokens / 1e6:,.2f} million tokens")
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _plot_losses(axes: Any, steps: list[dict[str, Any]], validation: list[dict[str, Any]]) -> None:
    domains = sorted({key.removeprefix(DOMAIN) for record in steps for key in record if key.startswith(DOMAIN)})
    for number, domain in enumerate(domains):
        points = [(r["step"], r[DOMAIN + domain]) for r in steps if r.get(DOMAIN + domain) is not None]
        axes.plot(*zip(*points, strict=True), color=f"C{number}", linewidth=0.8, alpha=0.5)
        held_out = [(r["step"], r[VALIDATION + domain]) for r in validation if VALIDATION + domain in r]
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o-", color=f"C{number}", markersize=4, label=domain)
        else:
            axes.plot([], [], color=f"C{number}", label=domain)
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("loss by domain: training (thin), held out (dots)", fontsize=10)
    axes.legend()


def _plot_optimizer(axes: Any, steps: list[dict[str, Any]]) -> None:
    number = [record["step"] for record in steps]
    axes.plot(number, [record["grad_norm"] for record in steps], color="C4", linewidth=0.8)
    axes.set_ylabel("gradient norm", color="C4")
    axes.set_yscale("log")
    axes.set_title("gradient norm and learning rate", fontsize=10)
    rates = axes.twinx()
    rates.plot(number, [record["lr"] for record in steps], color="C5")
    rates.set_ylabel("learning rate", color="C5")
