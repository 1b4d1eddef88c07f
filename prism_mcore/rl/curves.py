"""The picture of an RL run: held-out correctness, reward, length, entropy and the gap between sampler and training."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from prism_mcore.train.curves import read_records
from prism_mcore.train.metrics import STEPS_FILE, VALIDATION_FILE

HELD_OUT, NONE = "validation/reward/correct", "groups/solve_none"


def is_rl_run(run_dir: Path) -> bool:
    """Are these the metrics of an RL run?"""
    return any("reward/mean" in record for record in read_records(run_dir / STEPS_FILE)[:1])


def plot_rl_run(run_dir: Path) -> Path:
    """Draw <run_dir>/curves.png from the run's metrics."""
    steps, validation = read_records(run_dir / STEPS_FILE), read_records(run_dir / VALIDATION_FILE)
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    _draw(axes[0, 0], "answers that are right", steps, {"training": "reward/correct", "solved by none": NONE})
    _held_out(axes[0, 0], {"held out": validation})
    _draw(
        axes[0, 1], "response length, tokens", steps, {"mean": "rollout/length_mean", "longest": "rollout/length_max"}
    )
    _draw(axes[1, 0], "nats per token", steps, {"entropy": "entropy", "KL to the reference": "kl"})
    gaps = {"largest": "rl/logprob_gap_max", "mean": "rl/logprob_gap_mean"}
    _draw(axes[1, 1], "|log-prob in training - at sampling|, nats", steps, gaps)
    axes[1, 1].set_yscale("symlog", linthresh=1e-8)
    for place in axes.flat:
        place.set_xlabel("step")
        place.grid(alpha=0.3)
        place.legend()
    figure.suptitle(f"{run_dir.name}: {len(steps):,} steps, {int(sum(r['rollout/count'] for r in steps)):,} rollouts")
    return _saved(figure, run_dir / "curves.png")


def plot_held_out(runs: dict[str, Path], path: Path) -> Path:
    """Draw the held-out correctness of several runs, label -> folder, into one picture."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    _held_out(axes, {label: read_records(folder / VALIDATION_FILE) for label, folder in runs.items()})
    axes.set(xlabel="RL step", ylabel="held-out answers that are right", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    return _saved(figure, path)


def _draw(axes: Any, title: str, steps: list[dict[str, Any]], series: dict[str, str]) -> None:
    for label, key in series.items():
        points = [(record["step"], record[key]) for record in steps if record.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1)
    axes.set_title(title, fontsize=10)


def _held_out(axes: Any, runs: dict[str, list[dict[str, Any]]]) -> None:
    for label, records in runs.items():
        points = [(record["step"], record[HELD_OUT]) for record in records if record.get(HELD_OUT) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=label)


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
