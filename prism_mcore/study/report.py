"""A study's report: report.json with every number, and report.md with tables of them."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence

from prism_mcore.checkpoint.durable import write_atomically
from prism_mcore.console import say
from prism_mcore.study.graph import REPORT, Node
from prism_mcore.study.results import Results, read_results
from prism_mcore.study.settings import StudyProgram
from prism_mcore.study.verdicts import Verdict, verdicts


def write_report(study: StudyProgram, nodes: Mapping[str, Node]) -> None:
    """Into the report node's folder, of what is done so far."""
    results = read_results(nodes)
    folder = nodes[REPORT].folder / "out"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.json", json.dumps(as_json(results), indent=1) + "\n")
    write_atomically(folder / "report.md", page(study, results))
    say(f"wrote {folder / 'report.md'}")


def as_json(results: Results) -> dict[str, object]:
    """Every number under `name.model.sSEED`."""
    return {
        kind: {f"{name}.{model}.s{seed}": value for (name, model, seed), value in getattr(results, kind).items()}
        for kind in ("losses", "rewards", "idle_steps", "scores", "weights")
    }


def page(study: StudyProgram, results: Results) -> str:
    """Markdown: scores of arms by model, losses of mid-training, how weights changed; mean and spread over seeds."""
    parts = [f"# {study.study.name}\n"]
    if study.claims is not None:
        parts += [_verdict(verdict) for verdict in verdicts(study.claims, results)]
    parts.append("\nBelow: mean over seeds, and in brackets their lowest and highest.\n")
    scores = {
        (*name.split(" of ", 1), model, seed, task): found["score"]["value"]
        for (name, model, seed), tasks in results.scores.items()
        for task, found in tasks.items()
    }
    for evaluation in study.evaluate:
        found_rows = {(str(arm), str(task)) for name, arm, _, _, task in scores if name == evaluation}
        rows = sorted(found_rows, key=_order(study))
        cells = [
            [
                arm,
                task,
                *(
                    spread(
                        [v for (n, a, m, _, t), v in scores.items() if (n, a, m, t) == (evaluation, arm, model, task)]
                    )
                    for model in study.models
                ),
            ]
            for arm, task in rows
        ]
        parts.append(_table(f"Scores: {evaluation}", ["arm", "task", *study.models], cells))
    for title, found in (("Held-out loss, nats per token: before -> after", results.losses),):
        keys = list(dict.fromkeys((arm, domain) for (arm, _, _), values in found.items() for domain in values))
        cells = [
            [arm, domain.removeprefix("validation/"), *(_change(found, arm, domain, model) for model in study.models)]
            for arm, domain in keys
        ]
        parts.append(_table(title, ["arm", "of", *study.models], cells))
    columns = list(dict.fromkeys(column for values in results.weights.values() for column in values))
    for column in columns:
        names = list(dict.fromkeys(name for name, _, _ in results.weights))
        cells = [[name, *(_weights(results, name, column, model) for model in study.models)] for name in names]
        parts.append(_table(f"Weights: {column}", ["analysis", *study.models], cells))
    return "\n".join(part for part in parts if part)


def _verdict(verdict: Verdict) -> str:
    note = f" ({verdict.note})" if verdict.note else ""
    return f"- **{verdict.outcome}**: {verdict.claim}{note}\n" + "".join(f"  - {line}\n" for line in verdict.numbers)


def spread(values: Sequence[float]) -> str:
    """`0.42 [0.40, 0.45]`; one value alone; a dash where there is none."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.4g}"
    return f"{mean} [{min(values):.4g}, {max(values):.4g}]" if len(values) > 1 else mean


def _order(study: StudyProgram) -> Callable[[tuple[str, str]], tuple[str, int]]:
    arms = ["model", *study.arms]
    return lambda row: (row[1], arms.index(row[0]))


def _change(
    found: Mapping[tuple[str, str, int], Mapping[str, tuple[float, float]]], arm: str, of: str, model: str
) -> str:
    pairs = [values[of] for (name, m, _), values in found.items() if name == arm and m == model and of in values]
    return f"{spread([first for first, _ in pairs])} -> {spread([last for _, last in pairs])}" if pairs else "-"


def _weights(results: Results, name: str, column: str, model: str) -> str:
    return spread([v[column] for (n, m, _), v in results.weights.items() if n == name and m == model and column in v])


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return ""
    lines: list[Sequence[object]] = [head, ["---"] * len(head), *rows]
    return f"\n## {title}\n\n" + "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
