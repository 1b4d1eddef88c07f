"""Pictures of what changed, as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from prism_mcore.analyze.tables import Row
from prism_mcore.analyze.weights import CHANGED, THRESHOLDS


def draw_modules(path: Path, lines: Sequence[Row], models: Sequence[str]) -> None:
    """Share of weights changed by more than 1%, of themselves and of their tensor's RMS, by module, for every model."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", sharey=True)
    for ax, column, title in (
        (axes[0], "pooled_changed_1pct", "changed by more than 1% of themselves"),
        (axes[1], "pooled_changed_rms_1pct", "changed by more than 1% of their tensor's RMS"),
    ):
        _bars(ax, lines, models, column)
        ax.set_title(title, fontsize=10)
    axes[0].set_ylabel("share of weights")
    axes[0].legend(fontsize=8)
    _save(figure, path)


def _bars(axes: Any, lines: Sequence[Row], models: Sequence[str], column: str) -> None:
    names = list(dict.fromkeys(line["name"] for line in lines if line["level"] in ("total", "module")))
    width = 0.8 / len(models)
    for number, model in enumerate(models):
        found = {line["name"]: line[column] for line in lines if line["model"] == model}
        places = np.arange(len(names)) + (number - (len(models) - 1) / 2) * width
        axes.bar(places, [found[name] for name in names], width, label=model)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.grid(alpha=0.3, axis="y")


def draw_thresholds(path: Path, lines: Sequence[Row], models: Sequence[str]) -> None:
    """Share of all weights that changed by more than each threshold."""
    figure, axes = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    for model in models:
        (total,) = (line for line in lines if line["model"] == model and line["level"] == "total")
        axes.plot([100 * p for p in THRESHOLDS], [total[f"pooled_{name}"] for name in CHANGED], "o-", label=model)
    axes.axvspan(0.390625, 0.78125, color="grey", alpha=0.2, label="one step of bf16")
    axes.set(xscale="log", xlabel="change of a weight above, % of itself", ylabel="share of weights", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def draw_layers(path: Path, rows: Sequence[Row]) -> None:
    """relative_l2 of every module class in every layer, as a map; mean of a class's tensors in a layer."""
    inside = [row for row in rows if row["layer"] is not None]
    classes = list(dict.fromkeys(row["module_class"] for row in inside))
    layers = 1 + max((row["layer"] for row in inside), default=0)
    sums, counts = np.zeros((len(classes), layers)), np.zeros((len(classes), layers))
    for row in inside:
        place = classes.index(row["module_class"]), row["layer"]
        sums[place] += row["relative_l2"]
        counts[place] += 1
    figure, axes = plt.subplots(figsize=(12, 0.4 * len(classes) + 1.5), layout="constrained")
    with np.errstate(invalid="ignore"):
        image = axes.imshow(sums / counts, aspect="auto", interpolation="nearest", cmap="viridis")
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("layer")
    figure.colorbar(image, label="||new - old|| / ||old||")
    _save(figure, path)


def draw_similarity(path: Path, rows: Sequence[Row]) -> None:
    """CKA over layers with its interval, a panel for each prompt file; the noise floor is dashed."""
    files = list(dict.fromkeys(row["prompts"] for row in rows))
    figure, axes = plt.subplots(
        1, len(files), figsize=(1.5 + 4.5 * len(files), 4.5), layout="constrained", sharey=True, squeeze=False
    )
    for ax, file in zip(axes[0], files, strict=True):
        for pair in dict.fromkeys((row["first"], row["second"], row["noise_floor"]) for row in rows):
            own = [r for r in rows if (r["first"], r["second"], r["noise_floor"]) == pair and r["prompts"] == file]
            layers = [row["layer"] for row in own]
            label = f"{pair[0]} / {pair[1]}" + (" (two seeds)" if pair[2] else "")
            (line,) = ax.plot(layers, [row["cka"] for row in own], "--" if pair[2] else "-", label=label)
            low, high = ([row[edge] for row in own] for edge in ("low", "high"))
            ax.fill_between(layers, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        ax.set(title=file, xlabel="layer")
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("linear CKA")
    axes[0][0].legend(fontsize=8)
    _save(figure, path)


def draw_behaviour(path: Path, answers: dict[str, Any]) -> None:
    """Lengths of right and wrong answers, and how surprising their tokens are, of every model."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axis, value, label in (
        (axes[0], lambda answer: answer.tokens, "tokens of an answer"),
        (axes[1], lambda answer: None if answer.logprob is None else -answer.logprob, "nats per token"),
    ):
        found, names = [], []
        for model, of_model in answers.items():
            for right in (True, False):
                values = [value(answer) for answer in of_model if answer.correct == right]
                found.append([one for one in values if one is not None])
                names.append(f"{model}: {'right' if right else 'wrong'}")
        axis.boxplot(found, orientation="horizontal", tick_labels=names, showfliers=False)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    part = path.with_name(f".tmp_{path.name}")
    figure.savefig(part, dpi=120, format="png")
    plt.close(figure)
    part.replace(path)
