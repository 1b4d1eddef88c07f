"""Two evaluations side by side, or a run's steps: `python tools/compare_results.py A B`, `... --steps DIR DIR ...`.

Each is an --out folder of launch/evaluate.py. Of two, every task that both have is compared question by question: the
difference, its interval (paired bootstrap), p, and the smallest difference that these questions would show. With
--steps they are one run's evaluations in order: the best step for all tasks, the best step of each task, and how much
either promises too much, by split halves.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from prism_mcore.console import say, show
from prism_mcore.evaluate import statistics
from prism_mcore.evaluate.grading import Graded, by_question, read_graded
from prism_mcore.evaluate.statistics import Counts
from prism_mcore.plan import report

ENDING = ".verdicts.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="--out folders of launch/evaluate.py")
    parser.add_argument("--steps", action="store_true", help="they are the steps of one run, in order")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap and of the halves")
    arguments = parser.parse_args()
    try:
        if len(arguments.folders) < 2 or (len(arguments.folders) > 2 and not arguments.steps):
            raise ValueError(f"{len(arguments.folders)} folders; needed: two, or --steps and at least two")
        tasks = common(arguments.folders)
        if arguments.steps:
            compare_steps(arguments.folders, tasks, arguments.seed)
        else:
            compare_two(tasks, arguments.seed)
    except (ValueError, OSError) as error:
        say(f"error: {error}", stderr=True)
        return 2
    return 0


def common(folders: Sequence[Path]) -> dict[str, list[Counts]]:
    """Of each task that all have, the counts of each folder on the questions that all have, in one order.

    Raises ValueError where there is no such task, or no such question.
    """
    names = [{file.name.removesuffix(ENDING) for file in folder.glob(f"*{ENDING}")} for folder in folders]
    shared = set.intersection(*names)
    if not shared:
        listed = "; ".join(f"{f}: {', '.join(sorted(n)) or 'none'}" for f, n in zip(folders, names, strict=True))
        raise ValueError(f"there is no task of which all have verdicts ({listed})")
    tasks = {}
    for name in sorted(shared):
        found = [by_question(read_graded(folder / f"{name}{ENDING}")) for folder in folders]
        keys = [key for key in found[0] if all(key in each for each in found)]
        if not keys:
            raise ValueError(f"{name}: they have no question in common")
        if dropped := max(map(len, found)) - len(keys):
            say(f"note: {name}: {dropped:,} questions are not in all of them and do not count")
        tasks[name] = [counts([each[key] for key in keys]) for each in found]
    return tasks


def counts(questions: Sequence[Sequence[Graded]]) -> Counts:
    return Counts.of([[one.correct for one in samples] for samples in questions])


def compare_two(tasks: dict[str, list[Counts]], seed: int) -> None:
    rows = []
    for name, (a, b) in tasks.items():
        found = statistics.paired(a, b, seed=seed)
        rows.append(
            (
                name,
                f"{found.questions}",
                f"{100 * statistics.average(a):.1f}",
                f"{100 * statistics.average(b):.1f}",
                f"{100 * found.value:+.1f}",
                f"{100 * found.low:+.1f} to {100 * found.high:+.1f}",
                f"{found.p:.4f}",
                f"{100 * statistics.smallest_difference(a, b):.1f}",
            )
        )
    show(report.numbers("", ("percent", "questions", "first", "second", "gain", "95%", "p", "least"), rows))


def compare_steps(folders: Sequence[Path], tasks: dict[str, list[Counts]], seed: int) -> None:
    rows = []
    for title, choose in (("one step for all", statistics.one_step), ("best of each", statistics.best_of_each)):
        choice = choose(tasks)
        excess = statistics.optimism(choose, tasks, seed=seed)
        mean = sum(choice.scores.values()) / len(choice.scores)
        rows.append((title, f"{100 * mean:.1f}", f"{100 * excess:+.1f}"))
        say(f"{title}: " + ", ".join(f"{name} {folders[step].name}" for name, step in choice.steps.items()))
    show(report.numbers("", ("percent", "mean", "of it by choosing, at most"), rows))


if __name__ == "__main__":
    sys.exit(main())
