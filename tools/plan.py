"""How to lay a model out on so many GPUs, and how fast it will train: predictions by formula, without a GPU.

    python tools/plan.py --model nemotron-h-8b --gpus 128 [--gpu h100] [--fp8 any|off|on] [--out layout.yaml]
    python tools/plan.py --check            # the formula beside published runs

Searches tensor, context, pipeline and virtual pipeline parallelism, micro-batches, recomputation, FP8 and replicas of
the optimizer for the fastest layouts that fit in memory. Rates are a range: 95% of the formula for a tuned run, 80%
for a typical one.
"""

import argparse
import difflib
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import yaml

from prism_mcore.console import say, show
from prism_mcore.model.spec import ModelSpec, read_spec
from prism_mcore.plan import report
from prism_mcore.plan.hardware import GPUS
from prism_mcore.plan.published import ROWS
from prism_mcore.plan.search import Plan, build_of, search
from prism_mcore.plan.throughput import TUNED, TYPICAL


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a shipped shape such as llama-3.1-8b, a config.json, or a directory with one")
    parser.add_argument("--gpus", type=int, help="how many")
    parser.add_argument("--gpu", default="h100", help=f"which: {', '.join(GPUS)}")
    parser.add_argument("--seq-len", type=int, default=8192, help="tokens of a sequence")
    parser.add_argument("--global-batch", type=int, default=128, help="sequences of a step")
    parser.add_argument("--fp8", choices=("any", "on", "off"), default="any", help="precision.fp8 of what is searched")
    parser.add_argument("--best", type=int, default=10, help="how many layouts to print")
    parser.add_argument("--out", type=Path, help="write the fastest as a recipe's sections (YAML)")
    parser.add_argument("--check", action="store_true", help="print the formula beside published runs, and end")
    arguments = parser.parse_args()
    if arguments.check:
        show(report.published(ROWS))
        for row in ROWS:
            if row.note:
                say(f"{row.name}: {row.note}")
        return 0
    try:
        plan(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def plan(arguments: argparse.Namespace) -> None:
    """Search and print. Raises ValueError with what to change."""
    missing = [f"--{name}" for name in ("model", "gpus") if getattr(arguments, name) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing; try --model nemotron-h-8b --gpus 128")
    for name, least in (("gpus", 1), ("seq_len", 1), ("global_batch", 1), ("best", 1)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; at least {least} is needed")
    gpu = GPUS.get(arguments.gpu)
    if gpu is None:
        raise ValueError(
            f"--gpu {arguments.gpu} is not known{_nearest(arguments.gpu, GPUS)}; there are {', '.join(GPUS)}"
        )
    spec = read_spec(arguments.model)
    begun = time.monotonic()
    plans = search(
        spec,
        gpu,
        gpus=arguments.gpus,
        seq_len=arguments.seq_len,
        global_batch=arguments.global_batch,
        fp8={"any": (False, True), "on": (True,), "off": (False,)}[arguments.fp8],
        best=arguments.best,
    )
    show(report.plans(f"{arguments.model} on {arguments.gpus} x {gpu.name}, predicted", plans))
    show(report.step(plans[0].time))
    say(f"searched in {time.monotonic() - begun:.1f} s")
    if arguments.out:
        arguments.out.write_text(recipe(arguments, spec, plans[0]))
        say(f"{arguments.out} has the fastest")


def recipe(arguments: argparse.Namespace, spec: ModelSpec, fastest: Plan) -> str:
    """The sections of a recipe that make this layout."""
    layout, time = fastest.layout, fastest.time
    build = build_of(layout)
    sections = {
        "parallel": build.parallel.model_dump(exclude_defaults=True),
        "train": {"micro_batch": layout.micro_batch, "recompute": sorted(layout.recompute)},
        "precision": build.precision.model_dump(exclude_defaults=True),
    }
    return (
        f"# {spec.family} on {arguments.gpus} x {GPUS[arguments.gpu].name}, planned:"
        f" {TYPICAL * time.rate:,.0f} to {TUNED * time.rate:,.0f} tokens/s a GPU, {fastest.memory / 1e9:.0f} GB.\n"
        + yaml.safe_dump({name: values for name, values in sections.items() if values}, sort_keys=False)
    )


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), 1, 0.4)
    return f" (did you mean {near[0]}?)" if near else ""


if __name__ == "__main__":
    sys.exit(main())
