"""Draws the roofline of results/compile_sm90.json: our kernels and the peers' on an H100, as a model, not measured.

python benchmarks/roofline.py docs/roofline.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

HERE = Path(__file__).parent
PEAK_FLOPS, BANDWIDTH = 990e12, 3.35e12  # H100, as in compile_kernels.py
# (row, model) shown, TP 1, training: the shapes the ops are known by
SHOWN = {
    "rms_norm": "llama-3.1-8b",
    "add_rms_norm": "llama-3.1-8b",
    "swiglu": "llama-3.1-8b",
    "rope": "llama-3.1-8b",
    "squared_relu": "nemotron-h-8b",
    "gated_rms_norm": "nemotron-h-8b",
    "causal_conv1d": "nemotron-h-8b",
    "ssd_scan": "nemotron-h-8b",
    "attention": "llama-3.1-8b",
    "linear_cross_entropy": "llama-3.1-8b",
}
OURS, THEIRS = "#1f5fa8", "#d9822b"
Pass = dict[str, Any]


def draw(passes: list[Pass], path: Path) -> None:
    """Left: bytes over the fewest possible, where bytes decide. Right: where the ops with matrix products lie."""
    shown = [p for p in passes if p["phase"] == "train" and p["bytes"] and _is_shown(p)]
    figure, (bars, roof) = pyplot.subplots(1, 2, figsize=(13, 5.2), width_ratios=(3, 2), layout="constrained")
    _draw_bytes(bars, [p for p in shown if p["memory_bound"] or p["row"] == "ssd_scan"])
    _draw_roof(roof, [p for p in shown if p["flops"] and p["needed_flops"]])
    title = "Kernels compiled for H100, 8,192 training tokens, TP 1: a roofline model from counted bytes and products"
    figure.suptitle(title + ", not a measurement", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _is_shown(p: Pass) -> bool:
    return f"{SHOWN.get(p['row'])} TP1" in p["users"]


def _draw_bytes(axes: Axes, passes: list[Pass]) -> None:
    labels = list(dict.fromkeys((p["row"], p["direction"]) for p in passes if p["side"] == "ours"))
    height = 0.38
    for p in passes:
        if (p["row"], p["direction"]) not in labels:
            continue
        ours = p["side"] == "ours"
        ratio, place = p["bytes"] / p["minimum_bytes"], labels.index((p["row"], p["direction"]))
        y = place + (-height / 2 if ours else height / 2)
        axes.barh(y, ratio, height, color=OURS if ours else THEIRS)
        text = f"{ratio:.2f}" if ours else f"{ratio:.2f} {p['side']}"
        inside = ratio > 5  # a bar that leaves the picture
        axes.text(
            4.2 if inside else ratio + 0.03, y, text, va="center", fontsize=7, color="white" if inside else "black"
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(0, 6)
    axes.set_yticks(range(len(labels)), [f"{row} {direction}" for row, direction in labels], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("bytes moved (counted) / fewest possible")
    axes.barh([0], [0], color=OURS, label="ours")
    axes.barh([0], [0], color=THEIRS, label="Liger-Kernel, mamba-ssm")
    axes.legend(loc="upper right", fontsize=8)


def _draw_roof(axes: Axes, passes: list[Pass]) -> None:
    intensities = [10 ** (i / 20) for i in range(10, 90)]
    limits = [min(PEAK_FLOPS, x * BANDWIDTH) / 1e12 for x in intensities]
    axes.loglog(intensities, limits, color="black", linewidth=1)
    for p in passes:
        ours = p["side"] == "ours"
        # what the products that are needed reach, if every kernel runs at its roof
        reached = p["needed_flops"] / p["times"]["H100"]["model_s"] / 1e12
        intensity = p["needed_flops"] / p["bytes"]
        filled = p["direction"] == "forward"
        colour = OURS if ours else THEIRS
        axes.plot(intensity, reached, "o", color=colour, fillstyle="full" if filled else "none", markersize=7)
        name = p["row"] if ours else f"{p['row']}, {p['side']}"
        axes.annotate(
            name,
            (intensity, reached),
            xytext=(-7, 7) if ours else (7, -9),
            textcoords="offset points",
            fontsize=7,
            ha="right" if ours else "left",
        )
    axes.set_xlabel("needed FLOP / byte moved")
    axes.set_ylabel("TFLOP/s if every kernel runs at its roof (model)")
    axes.plot([], [], "o", color="grey", label="forward")
    axes.plot([], [], "o", color="grey", fillstyle="none", label="backward")
    axes.legend(loc="lower right", fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--report", type=Path, default=HERE / "results" / "compile_sm90.json")
    args = parser.parse_args()
    draw(json.loads(args.report.read_text())["passes"], args.picture)


if __name__ == "__main__":
    main()
