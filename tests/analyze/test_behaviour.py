"""How models answer, from each kind of file, against numbers worked out by hand."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from prism_mcore.analyze.behaviour import analyze_behaviour, behaviour, read_answers

ROOT = Path(__file__).parents[2]


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def verdict(correct, tokens, logprob, finish="stop"):
    return {
        "question": "q",
        "key": "k",
        "sample": 0,
        "correct": correct,
        "status": "ok",
        "extraction": "strict",
        "answer": "1",
        "gold": None,
        "finish": finish,
        "tokens": tokens,
        "repetition": 0.0,
        "logprob": logprob,
    }


def rollout(correct, tokens, logprob, finish="stop", source="sums"):
    rewards = {"correct": correct, "stop_token": 0.0}
    return {"source": source, "rewards": rewards, "tokens": tokens, "mean_logprob": logprob, "finish": finish}


def test_an_evaluation_by_hand(tmp_path):
    write(tmp_path / "own-math.verdicts.jsonl", verdict(1.0, 10, -0.5), verdict(0.0, 30, -1.5, "length"))
    write(tmp_path / "own-choice.verdicts.jsonl", verdict(1.0, 2, -0.1))
    choice, math, every = behaviour("m", list(read_answers(tmp_path)))
    assert (choice["task"], math["task"], every["task"]) == ("own-choice", "own-math", "all")
    assert math == {
        "model": "m",
        "task": "own-math",
        "answers": 2,
        "pass_rate": 0.5,
        "cut": 0.5,
        "length_mean": 20.0,
        "length_median": 20,
        "length_right": 10.0,
        "length_wrong": 30.0,
        "nll": 1.0,
        "nll_right": 0.5,
        "nll_wrong": 1.5,
    }
    assert choice["nll_wrong"] is None and choice["length_wrong"] is None
    assert every["pass_rate"] == pytest.approx(2 / 3) and every["length_median"] == 10


def test_rollouts_and_graded_responses(tmp_path):
    write(tmp_path / "run/rollouts/step_00000001.jsonl", rollout(1.0, 4, -0.2), rollout(0.0, 8, None))
    write(tmp_path / "run/rollouts/step_00000002.jsonl", rollout(1.0, 6, -0.4, "length", "code"))
    sums, code, _ = behaviour("run", list(read_answers(tmp_path / "run")))
    assert (sums["answers"], sums["nll"], sums["pass_rate"]) == (2, 0.2, 0.5)
    assert (code["task"], code["cut"]) == ("code", 1.0)
    graded = {"rewards": {"correct": 1.0}, "response_tokens": [1, 2], "logprobs": [-0.5, -1.5], "finish_reason": "stop"}
    (line,) = behaviour("g", list(read_answers(write(tmp_path / "graded.jsonl", graded))))
    assert (line["task"], line["length_mean"], line["nll"]) == ("graded", 2.0, 1.0)


def test_the_command_writes_tables_and_a_picture_of_every_model(tmp_path):
    one = write(tmp_path / "one/own.verdicts.jsonl", verdict(1.0, 10, -0.5), verdict(0.0, 30, -1.5)).parent
    two = write(tmp_path / "two/own.verdicts.jsonl", verdict(1.0, 5, -0.2)).parent
    out = tmp_path / "out"
    command = [sys.executable, "launch/analyze.py", "behaviour", str(one), str(two), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((out / "behaviour.csv").open()))
    assert [(row["model"], row["pass_rate"]) for row in rows] == [("one", "0.5"), ("two", "1.0")]
    assert rows[1]["nll_wrong"] == "" and (out / "behaviour.png").stat().st_size > 1000
    assert (out / "behaviour.parquet").is_file()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder, "has neither *.verdicts.jsonl"),
        (lambda folder: write(folder / "a.jsonl", {"response": "x"}), "a.jsonl, line 1: no `rewards`"),
        (lambda folder: write(folder / "a.jsonl", {"rewards": {}}), "line 1: neither `response_tokens` nor"),
        (lambda folder: write(folder / "a.jsonl"), "a.jsonl has no answers"),
        (lambda folder: write(folder / "a.verdicts.jsonl", {"question": "q"}), "line 1: no verdict"),
    ],
)
def test_what_holds_no_answers_is_refused(make, message, tmp_path):
    path = make(tmp_path)
    with pytest.raises(ValueError) as error:
        analyze_behaviour([path], ["m"], tmp_path / "out")
    assert message in str(error.value) and not (tmp_path / "out").exists()
