"""tools/compare_results.py: pairs by question, both choices of a step, and what has nothing in common."""

import importlib.util
import sys
from pathlib import Path

from prism_mcore.evaluate.grading import Graded, write_graded

ROOT = Path(__file__).parents[2]


def write(folder, task, verdicts):
    folder.mkdir(exist_ok=True)
    graded = [
        Graded(str(q), f"key {q}", s, float(right), "ok", "strict", "7", None, "stop", 9, 0.0, -0.1)
        for q, samples in verdicts.items()
        for s, right in enumerate(samples)
    ]
    write_graded(folder / f"{task}.verdicts.jsonl", graded)
    return folder


def compare(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare_results.py", *map(str, arguments)])
    spec = importlib.util.spec_from_file_location("compare_results", ROOT / "tools" / "compare_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main()


def test_two_results_are_compared_on_the_questions_of_both(tmp_path, capsys, monkeypatch):
    a = write(tmp_path / "a", "math500", {q: [q % 2, 0] for q in range(40)})
    b = write(tmp_path / "b", "math500", {q: [1, q % 2] for q in range(1, 41)})
    assert compare(monkeypatch, a, b) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "note: math500: 1 questions are not in all of them" in out
    assert "math500 39 25.6 75.6 +50.0 +" in out and "0.0002" in out


def test_the_steps_of_a_run(tmp_path, capsys, monkeypatch):
    steps = [write(tmp_path / f"step{n}", "math500", {q: [q % 3 == n] for q in range(30)}) for n in range(3)]
    for n, step in enumerate(steps):
        write(step, "gpqa", {q: [n == 2] for q in range(10)})
    assert compare(monkeypatch, "--steps", *steps) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "one step for all: gpqa step2, math500 step2" in out and "one step for all 66.7" in out
    assert "best of each: gpqa step2, math500 step0" in out


def test_what_cannot_be_compared_is_said(tmp_path, capsys, monkeypatch):
    a, b = write(tmp_path / "a", "gpqa", {1: [1]}), write(tmp_path / "b", "math500", {1: [1]})
    assert compare(monkeypatch, a, b) == 2
    assert "no task of which all have verdicts" in capsys.readouterr().err
    write(b, "gpqa", {2: [1]})
    assert compare(monkeypatch, a, b) == 2
    assert "gpqa: they have no question in common" in capsys.readouterr().err
    assert compare(monkeypatch, a) == 2
    assert "1 folders; needed: two, or --steps" in capsys.readouterr().err
