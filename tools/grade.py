"""Grade responses without a model: `python tools/grade.py IN.jsonl --out OUT.jsonl`.

Each line of IN has what a prompt has (`reward`, and `answer`, `metadata` or `tests` as that reward needs) and a
`response`. The same line comes out with `rewards`, the reward's named parts, `correct` among them, and `status`: ok,
timeout or crash, of which the last two say that grading failed and the response has no verdict. Lines come out in
order; a bad one ends the program before anything is graded, by file and line.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prism_mcore.checkpoint.durable import write_atomically
from prism_mcore.console import progress_bar, say
from prism_mcore.json_lines import JsonLines
from prism_mcore.rewards import check_record
from prism_mcore.rewards.verifier import Verdict, Verifier


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, metavar="IN.jsonl", help="records with a response each")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.jsonl", help="the same with rewards and status")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that grade")
    parser.add_argument("--timeout-s", type=float, default=10.0, help="seconds that one response may take")
    arguments = parser.parse_args()
    try:
        found = list(checked(arguments.input))
        if not found:
            raise ValueError(f"{arguments.input} has no records")
        if arguments.workers < 1:
            raise ValueError(f"--workers {arguments.workers}: at least 1 is needed")
        if arguments.timeout_s <= 0:
            raise ValueError(f"--timeout-s {arguments.timeout_s}: a response needs some time")
        if arguments.out.is_dir() or not arguments.out.parent.is_dir():
            raise ValueError(f"--out {arguments.out}: needed: a file in a folder that is there")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    verdicts = grade(found, arguments.workers, arguments.timeout_s)
    lines = [
        json.dumps(record | {"rewards": dict(verdict.parts), "status": verdict.status}, ensure_ascii=False)
        for record, verdict in zip(found, verdicts, strict=True)
    ]
    write_atomically(arguments.out, "\n".join(lines) + "\n")
    correct = sum(verdict.parts.get("correct", 0.0) for verdict in verdicts)
    counts = ", ".join(f"{n} {status}" for status, n in Counter(v.status for v in verdicts).most_common())
    say(f"{len(found)} responses, {correct:g} right ({counts}): {arguments.out}")
    return 0


def checked(path: Path) -> Iterator[dict[str, Any]]:
    """The file's records. Raises ValueError with file and line for one that its reward cannot grade."""
    for number, _, record in JsonLines(path):
        try:
            check_record(record)
            if not isinstance(record.get("response"), str):
                raise ValueError("it has no `response`, a text")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        yield record


def grade(found: list[dict[str, Any]], workers: int, timeout_s: float) -> list[Verdict]:
    """A verdict for each record."""
    verdicts: dict[int, Verdict] = {}
    with (
        Verifier(workers, timeout_s, {record["reward"] for record in found}) as verifier,
        progress_bar("grading", len(found)) as advance,
    ):
        for ticket, record in enumerate(found):
            verifier.submit(ticket, record, record["response"])
        while verifier.outstanding:
            for verdict in verifier.results() or verifier.results(block=True):
                verdicts[verdict.ticket] = verdict
                advance(1)
    return [verdicts[ticket] for ticket in range(len(found))]


if __name__ == "__main__":
    sys.exit(main())
