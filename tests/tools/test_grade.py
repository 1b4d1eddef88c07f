"""tools/grade.py: the same lines with their rewards, and bad ones refused by file and line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def grade(folder, *records, out="out.jsonl"):
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    command = [sys.executable, str(ROOT / "tools" / "grade.py"), str(folder / "in.jsonl")]
    command += ["--out", str(folder / out), "--workers", "1"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_lines_come_back_with_their_rewards(tmp_path):
    records = [
        {"reward": "math", "answer": "0.5", "response": "<think>so</think>\\boxed{\\frac12}", "id": 7},
        {"reward": "choice", "answer": "B", "response": "The answer is A or B"},
        {"reward": "math", "answer": "2", "response": "The answer is 3."},
    ]
    done = grade(tmp_path, *records)
    assert done.returncode == 0, done.stderr
    graded = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [each.pop("rewards")["correct"] for each in graded] == [1.0, 0.0, 0.0]
    assert [each.pop("status") for each in graded] == ["ok"] * 3
    assert graded == records
    assert "3 responses, 1 right (3 ok)" in done.stdout


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"reward": "math", "answer": "2"}, "in.jsonl, line 1: it has no `response`"),
        ({"reward": "maths", "answer": "2", "response": "2"}, "in.jsonl, line 1: "),
        ({"reward": "choice", "answer": "K", "response": "2"}, "needed: the letter of the right choice"),
    ],
)
def test_a_bad_line_is_named(tmp_path, record, message):
    done = grade(tmp_path, record)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("out", [".", "missing/out.jsonl"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_graded(tmp_path, out):
    done = grade(tmp_path, {"reward": "choice", "answer": "B", "response": "B"}, out=out)
    assert done.returncode == 2 and "a file in a folder that is there" in done.stderr


def test_a_file_without_records_is_refused(tmp_path):
    done = grade(tmp_path)
    assert done.returncode == 2 and "in.jsonl has no records" in done.stderr
