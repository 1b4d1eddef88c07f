"""How models answer: right answers, length, and how sure they are, of answers right and wrong."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prism_mcore.analyze.tables import Row, write_csv, write_parquet
from prism_mcore.evaluate.grading import read_graded
from prism_mcore.json_lines import JsonLines

VERDICTS = ".verdicts.jsonl"


@dataclass(frozen=True)
class Answer:
    """One graded response: `Answer("math500", correct=True, tokens=812, logprob=-0.21, cut=False)`."""

    task: str
    correct: bool
    tokens: int
    logprob: float | None  # mean over tokens, at sampling
    cut: bool  # it ended because there was no more room


def read_answers(path: Path) -> Iterator[Answer]:
    """Of an evaluation's folder, of a run's rollouts (its folder, or one step's file), or of graded responses.

    Graded responses are what tools/grade.py writes of launch/generate.py's. Raises ValueError, naming the file, for
    what is none of them, and for a folder without any answer.
    """
    if path.is_dir():
        verdicts = sorted(path.glob(f"*{VERDICTS}"))
        rollouts = sorted((path / "rollouts").glob("step_*.jsonl")) or sorted(path.glob("step_*.jsonl"))
        if not verdicts and not rollouts:
            raise ValueError(f"{path} has neither *{VERDICTS}, as launch/evaluate.py writes, nor rollouts/step_*.jsonl")
        for file in verdicts:
            yield from _of_evaluation(file)
        for file in [] if verdicts else rollouts:
            yield from _of_lines(file)
        return
    yield from _of_evaluation(path) if path.name.endswith(VERDICTS) else _of_lines(path)


def _of_evaluation(file: Path) -> Iterator[Answer]:
    task = file.name.removesuffix(VERDICTS)
    for one in read_graded(file):
        yield Answer(task, one.correct == 1.0, one.tokens, one.logprob, one.finish != "stop")


def _of_lines(file: Path) -> Iterator[Answer]:
    for number, _, record in JsonLines(file):
        rewards = record.get("rewards")
        if not isinstance(rewards, dict):
            raise ValueError(f"{file}, line {number}: no `rewards`; needed: rollouts, or what tools/grade.py writes")
        correct = rewards.get("correct", 0.0) == 1.0
        if "response_tokens" in record:  # of launch/generate.py
            tokens, logprobs = len(record["response_tokens"]), record.get("logprobs") or []
            mean = math.fsum(logprobs) / len(logprobs) if logprobs else None
            yield Answer(file.stem, correct, tokens, mean, record.get("finish_reason") != "stop")
        elif isinstance(record.get("tokens"), int):
            yield Answer(
                record.get("source", file.stem),
                correct,
                record["tokens"],
                record.get("mean_logprob"),
                record.get("finish") != "stop",
            )
        else:
            raise ValueError(f"{file}, line {number}: neither `response_tokens` nor a number of `tokens`")


def behaviour(model: str, answers: Sequence[Answer]) -> list[Row]:
    """A line for each task, and `all` where there are several."""
    tasks = list(dict.fromkeys(answer.task for answer in answers))
    parts = [(task, [answer for answer in answers if answer.task == task]) for task in tasks]
    return [_line(model, task, part) for task, part in parts + ([("all", list(answers))] if len(tasks) > 1 else [])]


def _line(model: str, task: str, answers: Sequence[Answer]) -> Row:
    right = [answer for answer in answers if answer.correct]
    wrong = [answer for answer in answers if not answer.correct]
    lengths = [answer.tokens for answer in answers]
    return {
        "model": model,
        "task": task,
        "answers": len(answers),
        "pass_rate": len(right) / len(answers),
        "cut": sum(answer.cut for answer in answers) / len(answers),
        "length_mean": statistics.fmean(lengths),
        "length_median": statistics.median(lengths),
        "length_right": _mean([float(answer.tokens) for answer in right]),
        "length_wrong": _mean([float(answer.tokens) for answer in wrong]),
        "nll": _surprise(answers),
        "nll_right": _surprise(right),
        "nll_wrong": _surprise(wrong),
    }


def _surprise(answers: Sequence[Answer]) -> float | None:
    """Mean over answers of their mean negative log-probability per token, nats."""
    return _mean([-answer.logprob for answer in answers if answer.logprob is not None])


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def analyze_behaviour(paths: Sequence[Path], names: Sequence[str], out: Path) -> list[Row]:
    """Write behaviour.csv, .parquet and .png of every model's answers; the lines.

    Raises ValueError, before anything is written, as `read_answers` and for a file without answers.
    """
    every = []
    for path in paths:
        answers = list(read_answers(path))
        if not answers:
            raise ValueError(f"{path} has no answers")
        every.append(answers)
    lines = [line for name, answers in zip(names, every, strict=True) for line in behaviour(name, answers)]
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "behaviour.csv", lines)
    write_parquet(out / "behaviour.parquet", lines)
    from prism_mcore.analyze.pictures import draw_behaviour  # matplotlib takes a second

    draw_behaviour(out / "behaviour.png", dict(zip(names, every, strict=True)))
    return lines
