"""What a study's nodes found, read from their folders: losses, scores, changes of weights; by arm, model and seed."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_mcore.checkpoint.durable import read_object
from prism_mcore.evaluate.result import RESULTS
from prism_mcore.study.graph import Node

TAKEN = ("score", "questions", "samples", "pass", "majority", "unparsed", "truncated", "length")  # of results.json
Run = tuple[str, str, int]  # arm (or evaluation's or analysis's name and arm), model, seed


@dataclass
class Results:
    """Everything by (arm, model, seed); numbers that a node did not leave are not there."""

    losses: dict[Run, dict[str, tuple[float, float]]] = field(default_factory=dict)  # domain -> first, last; nats
    rewards: dict[Run, dict[str, tuple[float, float]]] = field(default_factory=dict)  # of held-out prompts
    scores: dict[Run, dict[str, dict[str, Any]]] = field(
        default_factory=dict
    )  # "name of arm" -> task -> results.json's
    idle_steps: dict[Run, float] = field(default_factory=dict)  # share of RL's steps without a gradient
    weights: dict[Run, dict[str, float]] = field(default_factory=dict)  # analysis -> totals over weights.csv


def read_results(nodes: Mapping[str, Node]) -> Results:
    """Of the nodes that are done."""
    found = Results()
    for node in nodes.values():
        if node.seed is None or not (node.folder / "done.json").is_file():
            continue
        run = (node.label, node.model, node.seed)
        if node.kind == "midtrain":
            found.losses[run] = first_and_last(node.folder / "validation.jsonl")
        elif node.kind == "rl":
            found.rewards[run] = first_and_last(node.folder / "validation.jsonl")
            found.idle_steps[run] = idle_share(node.folder / "metrics.jsonl")
        elif node.kind == "evaluate":
            tasks = read_object(node.folder / "out" / RESULTS)["tasks"]
            found.scores[run] = {name: {key: task[key] for key in TAKEN if key in task} for name, task in tasks.items()}
        elif node.kind == "analyze" and (node.folder / "out" / "weights.csv").is_file():
            found.weights[run] = totals(node.folder / "out" / "weights.csv")
    return found


def first_and_last(file: Path) -> dict[str, tuple[float, float]]:
    """Of each number that a run validated, its value before the first step and after the last."""
    if not file.is_file():
        return {}
    records = [json.loads(line) for line in file.read_text().splitlines()]
    numbers = {name for record in records for name, value in record.items() if isinstance(value, int | float)}
    return {
        name: (records[0][name], records[-1][name])
        for name in sorted(numbers - {"step"})
        if name in records[0] and name in records[-1] and not name.startswith("time/")
    }


def idle_share(file: Path) -> float:
    """Of a run's steps, those without a gradient: none was taken (null), or it was zero."""
    norms = [json.loads(line)["grad_norm"] for line in file.read_text().splitlines()]
    return sum(not norm for norm in norms) / max(1, len(norms))


def totals(file: Path) -> dict[str, float]:
    """Of a weights.csv: shares over all weights, and the relative L2 as the mean over tensors by their size."""
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    size = sum(int(row["numel"]) for row in rows)
    columns = [name for name in rows[0] if name.startswith(("changed_", "relative_l2", "identical_"))] if rows else []
    return {name: sum(float(row[name]) * int(row["numel"]) for row in rows) / size for name in columns}
