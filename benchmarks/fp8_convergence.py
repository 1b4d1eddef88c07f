"""Does training in FP8 learn what training in bf16 does? Several seeds, a hybrid and a dense shape, on this machine.

    python benchmarks/fp8_convergence.py [--steps 900] [--seeds 0 1 2] [--jobs 2] [--picture docs/fp8-convergence.png]

Each run is `launch/midtrain.py` with the demo's recipe on one rank, in bf16, alone and with each FP8 recipe, whose
products are `kernels.fp8_linear`'s on the CPU. Runs of one seed start from the same weights and read the same tokens. A
run that is done is not run again; one that was stopped goes on. The corpus is that of `make demo` (runs/demo/corpus).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import prism_mcore.model
from prism_mcore.train.curves import VALIDATION, read_records
from prism_mcore.train.metrics import VALIDATION_FILE

SHAPES = {"hybrid": "demo", "dense": "demo-dense"}
# The demo's hybrid has 8 Mamba heads, so that in_proj has 648 rows: with 16 of half the width it has 656, as FP8 needs.
HEADS = {"hybrid": {"mamba_num_heads": 16, "mamba_head_dim": 16}}
CONFIGS = Path(prism_mcore.model.__path__[0]) / "configs"
RECIPES = ("off", "tensorwise", "blockwise")
COLOURS = {"off": "C0", "tensorwise": "C1", "blockwise": "C2"}


@dataclass(frozen=True)
class Training:
    """`Training(Path("runs/fp8"), "dense", "blockwise", 0)`: one of the runs that are compared."""

    folder: Path
    shape: str
    fp8: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.fp8}-{self.seed}"

    def spec(self) -> Path:
        """The shape's config.json, written beside the runs."""
        path = self.folder / f"{self.shape}.json"
        config = json.loads((CONFIGS / f"{SHAPES[self.shape]}.json").read_text())
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config | HEADS.get(self.shape, {}), indent=1))
        return path

    def command(self, steps: int, backend: str) -> list[str]:
        settings: dict[str, Any] = {
            "run.dir": self.folder,
            "run.name": self.name,
            "run.seed": self.seed,
            "model.spec": self.spec(),
            "parallel.tp": 1,
            "parallel.sequence_parallel": "false",
            "precision.dtype": "bf16",
            "precision.fp8": self.fp8,
            "train.steps": steps,
            "log.tensorboard": "false",
            "checkpoint.every": 10_000,
        }
        if self.fp8 != "off":
            settings["kernels.fp8_linear"] = backend
        recipe = ["launch/midtrain.py", "--recipe", "launch/recipes/demo.yaml"]
        return [sys.executable, *recipe, *(f"{name}={value}" for name, value in settings.items())]

    def held_out(self) -> list[tuple[int, float]]:
        """(step, nats per token): the mean over the domains of the held-out loss, in the precision of the training."""
        records = read_records(self.folder / self.name / VALIDATION_FILE)
        return [(r["step"], statistics.mean(v for k, v in r.items() if k.startswith(VALIDATION))) for r in records]

    def run(self, steps: int, backend: str) -> None:
        """Train, unless it is done; the log lies beside the run."""
        if any(step == steps for step, _ in self.held_out()):
            return
        command = self.command(steps, backend)
        with (self.folder / f"{self.name}.log").open("w") as log:
            subprocess.run(
                command,
                check=True,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        print(f"{self.name}: {self.held_out()[-1][1]:.4f}", flush=True)


def compare(trainings: list[Training], steps: int, bound: float = 0.01) -> dict[str, Any]:
    """Per shape and FP8 recipe: final losses by seed, their mean against bf16's, and bf16's spread over seeds.

    `within`: the means differ by less than `bound` of bf16's and the standard error of the difference of both.
    """
    final = {(t.shape, t.fp8, t.seed): dict(t.held_out())[steps] for t in trainings}
    seeds = sorted({t.seed for t in trainings})
    rows: dict[str, Any] = {}
    for shape in sorted({t.shape for t in trainings}):
        losses = {fp8: [final[shape, fp8, seed] for seed in seeds] for fp8 in RECIPES}
        base = statistics.mean(losses["off"])
        rows[shape] = {"bf16": {"losses": losses["off"], "mean": base, "stdev": statistics.stdev(losses["off"])}}
        for fp8 in RECIPES[1:]:
            mean = statistics.mean(losses[fp8])
            paired = [ours - theirs for ours, theirs in zip(losses[fp8], losses["off"], strict=True)]
            error = statistics.stdev(paired) / len(seeds) ** 0.5
            rows[shape][fp8] = {
                "losses": losses[fp8],
                "mean": mean,
                "of_bf16": mean / base - 1,
                "paired_differences": paired,
                "standard_error": error,
                "within": abs(mean - base) <= bound * base,
                "within_with_error": abs(mean - base) + error <= bound * base,
            }
    return rows


def draw(trainings: list[Training], picture: Path) -> None:
    """Held-out loss over steps, a panel a shape, a line a seed; below, the difference to bf16's of the same seed."""
    shapes = sorted({t.shape for t in trainings})
    figure, axes = plt.subplots(
        2, len(shapes), figsize=(11, 6), sharex=True, height_ratios=(2, 1), layout="constrained", squeeze=False
    )
    curves = {(t.shape, t.fp8, t.seed): dict(t.held_out()) for t in trainings}
    for column, shape in enumerate(shapes):
        for (which, fp8, seed), curve in curves.items():
            if which != shape:
                continue
            base = curves[shape, "off", seed]
            label = {"off": "bf16"}.get(fp8, f"FP8 {fp8}") if seed == min(t.seed for t in trainings) else None
            axes[0][column].plot(*zip(*curve.items(), strict=True), color=COLOURS[fp8], alpha=0.7, label=label)
            if fp8 != "off":
                steps = [step for step in curve if step in base]
                axes[1][column].plot(
                    steps, [100 * (curve[s] / base[s] - 1) for s in steps], color=COLOURS[fp8], alpha=0.7
                )
        axes[0][column].set(title=shape, yscale="log")
        axes[1][column].axhspan(-1, 1, color="grey", alpha=0.15)
        axes[1][column].set(xlabel="step")
        for row in (0, 1):
            axes[row][column].grid(alpha=0.3)
    axes[0][0].set_ylabel("held-out loss (nats per token)")
    axes[1][0].set_ylabel("beside bf16 (%)")
    axes[0][0].legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/fp8"), help="where the runs live")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--backend", default="reference", help="kernels.fp8_linear of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fp8_convergence.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/fp8-convergence.png"))
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    arguments = parser.parse_args()
    trainings = [
        Training(arguments.folder, shape, fp8, seed)
        for seed in arguments.seeds
        for shape in arguments.shapes
        for fp8 in RECIPES
    ]
    if arguments.dry_run:
        print("\n".join(" ".join(t.command(arguments.steps, arguments.backend)) for t in trainings))
        return
    if len(arguments.seeds) < 2:
        parser.error(f"--seeds {arguments.seeds[0]}: a spread needs at least two; try --seeds 0 1 2")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda t: t.run(arguments.steps, arguments.backend), trainings))
    result = {
        "command": f"python benchmarks/fp8_convergence.py --steps {arguments.steps} --seeds"
        f" {' '.join(map(str, arguments.seeds))}",
        "backend": arguments.backend,
        "device": "cpu",
        "torch": torch.__version__,
        "shapes": compare(trainings, arguments.steps),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(trainings, arguments.picture)
    for shape, rows in result["shapes"].items():
        print(f"{shape}: bf16 {rows['bf16']['mean']:.4f} (seeds ±{rows['bf16']['stdev']:.4f})")
        for fp8 in RECIPES[1:]:
            row = rows[fp8]
            print(f"  {fp8}: {row['mean']:.4f}, {row['of_bf16']:+.2%} ± {row['standard_error'] / row['mean']:.2%}")
    print(f"{arguments.out}, {arguments.picture}")


if __name__ == "__main__":
    main()
