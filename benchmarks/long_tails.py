"""How long replicas wait for the longest responses of a step, with and without `rl.token_budget`.

    python benchmarks/long_tails.py [--replicas 4] [--prompts 32] [--samples 16] [--slots 64] [--budget 2048 4096]

A simulation: lengths are drawn (lognormal, most of them short, a few at the limit), a decoding pass takes equally long
whatever runs in it, and slots are filled again as they are in the engine. Requests are dealt and ordered by the loop's
own code. The idle share is of all slots over all passes until the slowest replica of a step is done, whose passes are
counted. `torchrun --nproc-per-node 2 benchmarks/long_tails.py --real --prompts 8
--slots 16 --longest 256 --steps 4 --stop-ids 160 --budget 64` counts the same in two engines on a small random model.
"""

import argparse
import json
import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from prism_mcore.rl.rollout import dealt


def drawn(count: int, longest: int, random: np.random.Generator) -> np.ndarray:
    """Lengths of `count` responses: median a twelfth of the longest, one in thirty cut at it."""
    return np.minimum(longest, np.ceil(random.lognormal(math.log(longest / 12), 1.35, count))).astype(int)


def passes(lengths: Sequence[int], slots: int) -> int:
    """Decoding passes for responses that start in this order as slots become free."""
    ends = [0] * slots
    for length in lengths:
        place = ends.index(min(ends))
        ends[place] += length
    return max(ends)


def simulated(budget: int, options: argparse.Namespace) -> dict[str, float]:
    """Over `options.steps` steps after as many to get going."""
    random = np.random.default_rng(0)
    waiting: list[int] = []  # what is left of responses that were begun
    slowest = work = finished = 0
    for step in range(2 * options.steps):
        groups = [drawn(options.samples, options.longest, random) for _ in range(options.prompts)]
        tasks = [[left] for left in sorted(waiting, reverse=True)] + [list(group) for group in groups]
        places = dealt([len(task) for task in tasks], options.replicas)
        cut = budget or options.longest
        waiting = [left - cut for task in tasks for left in task if left > cut]
        if step < options.steps:
            continue
        runs = [[min(left, cut) for place in mine for left in tasks[place]] for mine in places]
        slowest += max(passes(run, options.slots) for run in runs)
        work += sum(map(sum, runs))
        finished += sum(left <= cut for task in tasks for left in task)
    return {
        "budget": budget,
        "idle_share": 1 - work / (slowest * options.slots * options.replicas),
        "passes_a_step": slowest / options.steps,
        "finished_a_step": finished / options.steps,
        "tokens_a_pass": work / slowest,
    }


@cache
def one_layout() -> Any:
    from prism_mcore.parallel import ParallelSettings, init_groups

    return init_groups(ParallelSettings())


def real(budget: int, options: argparse.Namespace) -> dict[str, float]:
    """Two engines: the same counts from their statistics, over the steps of a run whose weights stay."""
    import torch
    import torch.distributed as dist
    from training_step import SHAPES

    from prism_mcore.generate import Engine, EngineSettings, Request, Sampling
    from prism_mcore.model.build import build_chunks
    from prism_mcore.model.ops import Ops
    from prism_mcore.model.spec import spec_from_config

    groups = one_layout()
    spec = spec_from_config(SHAPES["hybrid"])
    device = torch.device("cpu")
    layers = [list(range(len(spec.pattern)))]
    (model,) = build_chunks(spec, layers, groups, Ops({}, device), dtype=torch.float32, device=device)
    model.initialise(0)
    engine = Engine(model, settings=EngineSettings(slots=options.slots))
    sampling = Sampling(max_tokens=options.longest, stop_ids=list(range(options.stop_ids)), temperature=1.0)
    waiting: list[Request] = []
    slowest = work = 0
    for step in range(options.steps):
        new = [
            Request((5, 6, 7), tuple((0, step, i, j) for j in range(options.samples))) for i in range(options.prompts)
        ]
        tasks = [*sorted(waiting, key=lambda r: -r.begun), *new]
        mine = dealt([len(task.keys) for task in tasks], 2)[dist.get_rank()]
        before, left = engine.statistics, []
        for c in engine.stream([tasks[i] for i in mine], sampling, budget=budget):
            task = tasks[mine[c.request]]
            if c.finish == "budget":
                key = (task.keys[c.sample],)
                left.append(Request(task.tokens + c.tokens, key, begun=task.begun + len(c.tokens)))
        after = engine.statistics
        counts: list[Any] = [None, None]
        here = after.steps - before.steps, after.running_steps - before.running_steps, left
        dist.all_gather_object(counts, here)
        slowest += max(steps for steps, _, _ in counts)
        work += sum(running for _, running, _ in counts)
        waiting = [one for *_, of_rank in counts for one in of_rank]
    return {
        "budget": budget,
        "idle_share": 1 - work / (slowest * options.slots * 2),
        "passes_a_step": slowest / options.steps,
        "tokens_a_pass": work / slowest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--slots", type=int, default=64, help="of each replica")
    parser.add_argument("--longest", type=int, default=13312, help="tokens of a response (default: the paper's)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--budget", type=int, nargs="*", default=[1024, 2048, 4096])
    parser.add_argument("--real", action="store_true", help="two engines under torchrun instead of the simulation")
    parser.add_argument("--stop-ids", type=int, default=1, help="--real: tokens that end a response")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    if options.real:
        from prism_mcore import platform

        platform.start(threads=1)
    count = real if options.real else simulated
    rows = [count(budget, options) for budget in (0, *options.budget)]
    if int(os.environ.get("RANK", "0")):
        return
    for row in rows:
        print(", ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
    if options.out:
        options.out.write_text(
            json.dumps({"options": vars(options) | {"out": str(options.out)}, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
