"""What an evaluation says at its end: OUT/results.json, and the same for a terminal."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from prism_mcore.checkpoint.durable import read_object, write_atomically
from prism_mcore.config import dump
from prism_mcore.console import progress_bar, say, show
from prism_mcore.evaluate import contamination, statistics
from prism_mcore.evaluate.grading import Graded, changed, counts_of, grade, read_graded, summary, write_graded
from prism_mcore.evaluate.jobs import Job
from prism_mcore.evaluate.samples import Sample
from prism_mcore.evaluate.settings import EvaluateSettings
from prism_mcore.generate import unfinished
from prism_mcore.plan import report
from prism_mcore.text import load_tokenizer

RESULTS, SETTINGS = "results.json", "settings.yaml"
SHOWN_CHANGES = 20


def score(out: Path, settings: EvaluateSettings, jobs: Sequence[Job], model: Mapping[str, str]) -> dict[str, Any]:
    """Grade what is there of the jobs, write each task's verdicts, and results.json; one process calls it.

    model: {"hf": folder, "identity": hash}. Tasks of earlier evaluations of the same model in `out` stay in it. Raises
    ValueError where a task has no samples yet, or results.json is another model's.
    """
    tasks = earlier_tasks(out, model)
    overlap = overlap_of(settings, jobs, Path(model["hf"]))
    for job in jobs:
        samples = samples_of(job)
        graded = grade(job, samples, settings.grading)
        file = job.out.with_name(f"{job.task.name}.verdicts.jsonl")
        if file.is_file():
            _show_changes(job.task.title, changed(read_graded(file), graded))
        write_graded(file, graded)
        found = {"file": job.name} | summary(job, graded, settings.grading)
        if overlap is not None:
            found["contamination"] = _contamination(overlap[job.task.name], graded, settings)
        tasks[job.task.name] = found
    scores = {name: task["score"]["value"] for name, task in tasks.items()}
    averages = (
        {"plain": statistics.plain_average(scores), "domains": statistics.domain_average(scores)}
        if set(statistics.SIX) <= set(scores)
        else None
    )
    results = {"model": dict(model), "tasks": tasks, "averages": averages}
    write_atomically(out / SETTINGS, dump(settings))
    write_atomically(out / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return results


def overlap_of(settings: EvaluateSettings, jobs: Sequence[Job], hf: Path) -> dict[str, dict[str, float | None]] | None:
    """Of each task and question (by key), the share of its n-grams in the training data; None where none is given.

    Raises ValueError for token files that cannot be compared with the model in `hf`.
    """
    how = settings.contamination
    if not how.tokens:
        return None
    tokenizer = jobs[0].tokenizer or load_tokenizer(hf)
    total = contamination.check_files(how.tokens, tokenizer)
    questions = {
        f"{job.task.name}/{problem.key}": tokenizer.encode(problem.text) for job in jobs for problem in job.problems
    }
    with progress_bar("contamination, tokens", total) as advance:
        found = contamination.overlaps(questions, how.tokens, how.ngram, advance)
    return {
        job.task.name: {problem.key: found[f"{job.task.name}/{problem.key}"] for problem in job.problems}
        for job in jobs
    }


def _contamination(
    overlap: Mapping[str, float | None], graded: Sequence[Graded], settings: EvaluateSettings
) -> dict[str, Any]:
    """What results.json says of a task: hits by their id, and the score without them."""
    how = settings.contamination
    ids = {one.key: one.question for one in graded}
    report = contamination.report(
        {ids[key]: share for key, share in overlap.items() if key in ids}, how.ngram, how.share
    )
    clean = [one for one in graded if one.question not in report["hits"]]
    score = asdict(statistics.interval(counts_of(clean), seed=settings.grading.seed)) if clean else None
    return report | {"files": how.tokens, "score_without_hits": score}


def earlier_tasks(out: Path, model: Mapping[str, str]) -> dict[str, Any]:
    """Results that are there already. Raises ValueError where they are another model's."""
    if not (out / RESULTS).is_file():
        return {}
    found = read_object(out / RESULTS)
    if found.get("model", {}).get("identity") != model["identity"]:
        raise ValueError(
            f"{out / RESULTS} is of another model, {found.get('model', {}).get('hf')}; choose another --out"
        )
    return dict(found["tasks"])


def open_result(out: Path) -> tuple[dict[str, Any], Path]:
    """results.json of a finished evaluation, and the settings it was made with. Raises ValueError without them."""
    if not (out / RESULTS).is_file() or not (out / SETTINGS).is_file():
        raise ValueError(f"{out} has no {RESULTS} and {SETTINGS}: no evaluation was finished there; evaluate first")
    found = read_object(out / RESULTS)
    if not isinstance(found.get("tasks"), dict) or not isinstance(found.get("model"), dict):
        raise ValueError(f"{out / RESULTS} has no tasks and model; evaluate again")
    return found, out / SETTINGS


def samples_of(job: Job) -> list[Sample]:
    """The samples of a task that are asked for and are there, in order."""
    found: dict[tuple[str, int], Sample] = {}
    for file in unfinished.files(job.out):
        for number, record in unfinished.lines(file, job.out, {}):
            try:
                sample = Sample(**record)
            except TypeError as error:
                raise unfinished.broken(file, number, job.out, error) from error
            found[sample.place] = sample
    asked = {problem.key: n for n, problem in enumerate(job.problems)}
    most = job.sampling.samples
    here = [sample for (key, number), sample in found.items() if key in asked and number < most]
    if not here:
        raise ValueError(f"{job.out}.samples holds no sample of {job.task.title}'s questions; evaluate it first")
    return sorted(here, key=lambda sample: (asked[sample.key], sample.sample))


def _show_changes(title: str, changes: Sequence[tuple[Graded, Graded]]) -> None:
    if not changes:
        return
    say(f"{title}: {len(changes):,} verdicts changed")
    for was, now in changes[:SHOWN_CHANGES]:
        say(
            f"  {now.question}, sample {now.sample}: {'right' if was.correct else 'wrong'} ({was.extraction},"
            f" {was.answer!r:.60}) -> {'right' if now.correct else 'wrong'} ({now.extraction}, {now.answer!r:.60})"
        )
    if len(changes) > SHOWN_CHANGES:
        say(f"  and {len(changes) - SHOWN_CHANGES:,} more")


def show_results(results: Mapping[str, Any]) -> None:
    """Beside every score its interval, what was not parsed or was cut, and what it could tell apart."""
    tasks = results["tasks"]
    show(report.numbers("", SCORE_COLUMNS, [_score_row(task) for task in tasks.values()]))
    if several := [task for task in tasks.values() if len(task["pass"]) > 1]:
        show(report.numbers("", ("", "pass@k", "maj@n"), map(_pass_row, several)))
    for name, task in tasks.items():
        if task["letters"]:
            show(_letters(task))
        if found := task.get("contamination"):
            without = found["score_without_hits"]
            say(
                f"{task['title']}: {len(found['hits']):,} of {task['questions']:,} questions are in the training data"
                + (f"; without them {without['value']:.1%}" if found["hits"] and without else "")
            )
        if task["grading_failed"]:
            say(f"note: grading failed on {task['grading_failed']:.1%} of {name}'s samples; they count as wrong")
    if averages := results["averages"]:
        say(
            f"six-way mean {averages['plain']:.2%}; mean of code, math and science {averages['domains']:.2%}"
            " (the paper's AVG)"
        )


# percent, but for the questions of those published and their samples; least: the smallest difference that shows
SCORE_COLUMNS = ("percent", "score", "95%", "questions", "samples", "unread", "cut", "least")


def _score_row(task: Mapping[str, Any]) -> tuple[str, ...]:
    interval, published, samples = task["score"], task["published"], task["samples"]
    return (
        task["title"],
        _percent(interval["value"]),
        f"{_percent(interval['low'])}-{_percent(interval['high'])}",
        f"{task['questions']}/{published}" if published else str(task["questions"]),
        str(samples) if isinstance(samples, int) else f"{samples[0]}-{samples[1]}",
        *(_percent(task[name]) for name in ("unparsed", "truncated", "smallest_difference")),
    )


def _pass_row(task: Mapping[str, Any]) -> tuple[str, ...]:
    passes = ", ".join(f"{k}: {_percent(share)}" for k, share in task["pass"].items())
    return task["title"], passes, _percent(task["majority"])


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _letters(task: Mapping[str, Any]) -> Table:
    given = list(next(iter(task["letters"].values())))
    rows = [(f"right: {gold}", *(str(counts[answer]) for answer in given)) for gold, counts in task["letters"].items()]
    return report.numbers(f"{task['title']}: letters given", ("", *given), rows)
