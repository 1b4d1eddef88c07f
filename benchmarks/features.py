"""What each feature of the training step is worth here: the same few layers with it on and off, in turns.

    python benchmarks/features.py --out benchmarks/results/features_h200.json [--nproc 8] [--minutes 9]
    python benchmarks/features.py --dry-run          # the commands

Each run is benchmarks/throughput.py on 8 sub-layers of Llama-3.1-8B and of Nemotron-H-8B, 8,192 tokens a micro-batch,
and the ratio is that of the fastest steps. What needs several GPUs is left out on one. Results are written after every
run: what ends the script early leaves what it had.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
RECIPES = {
    "dense": "launch/recipes/paper/llama-3.1-8b-m.yaml",
    "hybrid": "launch/recipes/paper/nemotron-h-8b-m.yaml",
}
COMMON = ["parallel.tp=1", "parallel.sequence_parallel=false", "parallel.optimizer_instances=1", "run.name=features"]


@dataclass(frozen=True)
class Feature:
    """`Feature("fp8 tensorwise", on=["precision.fp8=tensorwise"])`: settings, and environment, with it and without."""

    name: str
    on: list[str] = field(default_factory=list)
    off: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    gpus: int = 1


FEATURES = [
    Feature("fp8 tensorwise", ["precision.fp8=tensorwise"]),
    Feature("fp8 blockwise", ["precision.fp8=blockwise"]),
    Feature(
        "fp8 tensorwise by torch beside Transformer Engine",
        ["precision.fp8=tensorwise", "kernels.fp8_linear=torch"],
        ["precision.fp8=tensorwise"],
    ),
    Feature(
        "fp8 blockwise by our kernel beside torch",
        ["precision.fp8=blockwise", "kernels.fp8_linear=triton"],
        ["precision.fp8=blockwise", "kernels.fp8_linear=torch"],
    ),
    Feature("fp8 but for two sub-layers at the ends", ["precision.fp8=tensorwise", "precision.fp8_bf16_ends=1"]),
    Feature("recomputed MLP", ["train.recompute=[mlp]"]),
    Feature("expandable segments", environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
    Feature("one hardware queue", environment={"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
    Feature("bf16 gradients on the wire", ["optimizer.grad_reduce=bf16"], gpus=2),
    Feature(
        "masters of bf16 and a remainder",
        ["optimizer.masters=remainder", "kernels.adamw=triton"],
        ["kernels.adamw=triton"],
    ),
    Feature("buckets of 10 million", ["optimizer.bucket_size=10000000"], gpus=2),
    Feature("tensor parallelism of 2", ["parallel.tp=2", "parallel.sequence_parallel=true"], gpus=2),
]


def command(shape: str, settings: list[str], arguments: argparse.Namespace, out: Path) -> list[str]:
    """One run of throughput.py."""
    batch = [f"train.global_batch={2 * arguments.nproc}", "train.micro_batch=1"]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(arguments.nproc)),
        *(str(HERE / "throughput.py"), "--recipe", str(HERE.parent / arguments.recipes[shape]), "--layers", "8"),
        *("--steps", str(arguments.steps), "--out", str(out)),
        *(*COMMON, *batch, *arguments.settings, *settings),
    ]


def run(shape: str, settings: list[str], environment: dict[str, str], arguments: argparse.Namespace) -> dict:
    """What throughput.py measured, or why it did not."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        done = subprocess.run(
            command(shape, settings, arguments, out), env=os.environ | environment, capture_output=True, text=True
        )
        if done.returncode:
            return {"failed": (done.stderr or done.stdout).strip().splitlines()[-1:]}
        result = json.loads(out.read_text())
    return {key: result[key] for key in ("step_s", "tokens_per_s", "peak_memory_gb", "device", "torch")}


def measure(arguments: argparse.Namespace) -> dict:
    """Every feature that this machine can run, both sides twice in turns, until the time is over."""
    begun, results = time.monotonic(), {}
    for feature in FEATURES:
        for shape in arguments.recipes:
            name = f"{feature.name}, {shape}"
            if feature.gpus > arguments.nproc:
                results[name] = {"left out": f"needs {feature.gpus} GPUs"}
            elif time.monotonic() - begun > 60 * arguments.minutes:
                results[name] = {"left out": f"the {arguments.minutes} minutes were over"}
            else:
                results[name] = compared(feature, shape, arguments)
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{name}: {summary(results[name])}", flush=True)
    return results


def compared(feature: Feature, shape: str, arguments: argparse.Namespace) -> dict:
    sides: dict[str, list[dict]] = {"on": [], "off": []}
    for _ in range(arguments.rounds):
        sides["on"].append(run(shape, feature.on, feature.environment, arguments))
        sides["off"].append(run(shape, feature.off, {}, arguments))
    failed = [each for runs in sides.values() for each in runs if "failed" in each]
    if failed:
        return failed[0]
    fastest = {side: min(each["step_s"]["min"] for each in runs) for side, runs in sides.items()}
    return {"speed_up": fastest["off"] / fastest["on"], **sides}


def summary(result: dict) -> str:
    if "speed_up" in result:
        return f"{result['speed_up']:.3f}x"
    return "; ".join(f"{key}: {value}" for key, value in result.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("features.json"), metavar="FILE", help="JSON of the results")
    parser.add_argument("--nproc", type=int, default=1, help="GPUs, one rank each")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a run")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each side, in turns")
    parser.add_argument("--minutes", type=float, default=9, help="no run starts after so many")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("settings", nargs="*", metavar="section.name=value", help="settings of every run")
    parser.set_defaults(recipes=RECIPES)
    arguments = parser.parse_intermixed_args()
    if arguments.dry_run:
        for feature in FEATURES:
            for shape in arguments.recipes:
                for side in (feature.on, feature.off):
                    print(feature.name, "|", " ".join(command(shape, side, arguments, Path("RESULT"))[1:]))
        return
    measure(arguments)


if __name__ == "__main__":
    main()
