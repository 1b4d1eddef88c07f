"""Samples graded: which are right, what each answers and in what form, and what that makes of a task."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prism_mcore.checkpoint.durable import write_atomically
from prism_mcore.console import progress_bar
from prism_mcore.evaluate import statistics
from prism_mcore.evaluate.jobs import Job
from prism_mcore.evaluate.problems import LETTERS
from prism_mcore.evaluate.samples import Sample
from prism_mcore.evaluate.settings import GradingSettings
from prism_mcore.json_lines import JsonLines
from prism_mcore.rewards.code import Limits
from prism_mcore.rewards.extraction import KINDS
from prism_mcore.rewards.format import repeated_fraction
from prism_mcore.rewards.verifier import Verdict, Verifier

REPEATED = 20  # tokens in the n-grams whose repetition is reported


@dataclass(frozen=True)
class Graded:
    """One sample's verdict: a line of OUT/<task>.verdicts.jsonl; its response is in OUT/<task>.samples."""

    question: str
    key: str
    sample: int
    correct: float
    status: str  # ok, or that grading failed: timeout, crash
    extraction: str  # strict, lenient, none
    answer: str | None  # what was extracted
    gold: str | None  # a choice's right letter in this sample's order
    finish: str  # stop, length, context
    tokens: int
    repetition: float  # share of 20-grams that occurred before
    logprob: float  # mean over tokens


def grade(job: Job, samples: Sequence[Sample], settings: GradingSettings) -> list[Graded]:
    """Verdicts of a task's samples, in their order. Where grading fails it is tried again: the machine may be busy."""
    problems = {problem.key: problem for problem in job.problems}
    records = [job.asked(problems[sample.key], sample.sample).record for sample in samples]
    limits = Limits(settings.test_s, settings.program_s, settings.memory_mb, "all")
    verdicts: dict[int, Verdict] = {}
    with (
        Verifier(settings.workers, settings.timeout_s, {record["reward"] for record in records}, limits) as verifier,
        progress_bar(f"grading {job.task.title}", len(samples)) as advance,
    ):
        for attempt in range(2):
            for ticket, (record, sample) in enumerate(zip(records, samples, strict=True)):
                if attempt == 0 or verdicts[ticket].status != "ok":
                    verifier.submit(ticket, record, sample.text, settings.extractor)
            while verifier.outstanding:
                for verdict in verifier.results() or verifier.results(block=True):
                    verdicts[verdict.ticket] = verdict
                    advance(1 - attempt)
    return [_graded(s, verdicts[n], records[n]) for n, s in enumerate(samples)]


def _graded(sample: Sample, verdict: Verdict, record: Mapping[str, Any]) -> Graded:
    kind, answer = verdict.extraction
    return Graded(
        question=sample.question,
        key=sample.key,
        sample=sample.sample,
        correct=verdict.parts.get("correct", 0.0),
        status=verdict.status,
        extraction=kind,
        answer=answer,
        gold=record["answer"] if record["reward"] == "choice" else None,
        finish=sample.finish,
        tokens=len(sample.tokens),
        repetition=repeated_fraction(sample.tokens, REPEATED),
        logprob=sample.logprob,
    )


def write_graded(path: Path, graded: Sequence[Graded]) -> None:
    write_atomically(path, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in graded))


def read_graded(path: Path) -> list[Graded]:
    """Raises ValueError, naming the line, for one that this program did not write."""
    found = []
    for number, _, record in JsonLines(path):
        try:
            found.append(Graded(**record))
        except TypeError as error:
            raise ValueError(f"{path}, line {number}: no verdict ({error}); grade again with --rescore") from error
    return found


def by_question(graded: Sequence[Graded]) -> dict[str, list[Graded]]:
    """Verdicts of each question, in the order of the file, by its key."""
    found: dict[str, list[Graded]] = {}
    for one in graded:
        found.setdefault(one.key, []).append(one)
    return found


def counts_of(graded: Sequence[Graded]) -> statistics.Counts:
    return statistics.Counts.of([[one.correct for one in each] for each in by_question(graded).values()])


def summary(job: Job, graded: Sequence[Graded], settings: GradingSettings) -> dict[str, Any]:
    """What results.json says of a task; shares, not percent."""
    counts, sampling = counts_of(graded), job.sampling
    each = by_question(graded).values()
    fewest, most = int(counts.samples.min()), int(counts.samples.max())
    total = len(graded)
    return {
        "title": job.task.title,
        "questions": len(counts.right),
        "published": job.task.rows or None,
        "samples": fewest if fewest == most else [fewest, most],
        "score": asdict(statistics.interval(counts, seed=settings.seed)),
        "standard_error": statistics.standard_error(counts) if len(counts.right) > 1 else None,
        "smallest_difference": statistics.smallest_difference(counts),
        "pass": {str(k): statistics.pass_at(counts, k) for k in _powers(fewest)},
        "majority": statistics.majority(
            [[one.answer for one in group] for group in each], [[one.correct for one in group] for group in each]
        ),
        "unparsed": sum(one.extraction == "none" for one in graded) / total,
        "truncated": sum(one.finish != "stop" for one in graded) / total,
        "grading_failed": sum(one.status != "ok" for one in graded) / total,
        "extraction": {kind: sum(one.extraction == kind for one in graded) / total for kind in KINDS},
        "finish": dict(sorted(Counter(one.finish for one in graded).items())),
        "tokens": sum(one.tokens for one in graded) / total,
        "repetition": sum(one.repetition for one in graded) / total,
        "letters": letters(graded),
        "sampling": sampling.model_dump(mode="json", include={"temperature", "top_p", "max_tokens", "seed", "stop"}),
        "settings_from": job.task.source,
        "extractor": settings.extractor,
    }


def letters(graded: Sequence[Graded]) -> dict[str, dict[str, int]] | None:
    """Of choices, how often each letter was given where each was right: {"A": {"A": 40, "B": 3, "none": 2}, ...}."""
    golds = sorted({one.gold for one in graded if one.gold is not None})
    if not golds:
        return None
    given = sorted({*golds, *(one.answer for one in graded if one.answer and one.answer in LETTERS)})
    found = Counter((one.gold, one.answer or "none") for one in graded)
    return {gold: {answer: found[gold, answer] for answer in [*given, "none"]} for gold in golds}


def _powers(n: int) -> list[int]:
    powers = [1 << shift for shift in range(n.bit_length()) if 1 << shift <= n]
    return powers if powers[-1] == n else [*powers, n]


def changed(before: Sequence[Graded], after: Sequence[Graded]) -> list[tuple[Graded, Graded]]:
    """Verdicts that two gradings of the same samples do not share."""
    then = {(one.key, one.sample): one for one in before}
    pairs = [(then[one.key, one.sample], one) for one in after if (one.key, one.sample) in then]
    return [(was, now) for was, now in pairs if was.correct != now.correct]
