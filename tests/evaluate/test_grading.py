"""Samples on disk and their verdicts: what is kept, what is refused, and what a task's summary counts."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from prism_mcore.evaluate import grading
from prism_mcore.evaluate import samples as kept
from prism_mcore.evaluate.grading import changed, grade, letters, read_graded, summary, write_graded
from prism_mcore.evaluate.jobs import read_jobs
from prism_mcore.evaluate.result import earlier_tasks, samples_of, score
from prism_mcore.evaluate.settings import EvaluateSettings, EvaluationSettings, GpqaSettings, GradingSettings
from prism_mcore.generate.requests import Completion
from prism_mcore.rewards.verifier import Verifier
from prism_mcore.text import StopTexts, Tokenizer

LENIENT, STRICT = GradingSettings(workers=1), GradingSettings(workers=1, extractor="strict")


def job_of(tmp_path, lines, **settings):
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (job,) = read_jobs([str(tmp_path / "mine.jsonl")], tmp_path, EvaluateSettings(**settings), None, None)
    return job


def sample_of(job, question, number, response, **more):
    problem = job.problems[question]
    plain = {"prompt": "0" * 16, "tokens": [1] * 30, "logprob": -0.5, "finish": "stop", "in_think": False} | more
    return kept.Sample(question=problem.id, key=problem.key, sample=number, response=response, **plain)


MATH = [{"id": name, "question": f"{name}?", "answer": "7", "reward": "math"} for name in "ab"]


def test_verdicts_and_their_summary(tmp_path):
    job = job_of(tmp_path, MATH)
    samples = [
        sample_of(job, 0, 0, r"<think>5</think>\boxed{7}"),
        sample_of(job, 0, 1, "<think>7</think>The answer is 7."),
        sample_of(job, 1, 0, "<think>so it is 7", finish="length"),
        sample_of(job, 1, 1, r"it is \boxed{7}", in_think=True, finish="length"),
    ]
    graded = grade(job, samples, LENIENT)
    assert [(one.correct, one.extraction, one.answer) for one in graded] == [
        (1.0, "strict", "7"),
        (1.0, "lenient", "7"),
        (0.0, "none", None),
        (0.0, "none", None),  # its prompt began the reasoning, which does not end
    ]
    found = summary(job, graded, LENIENT)
    assert found["score"]["value"] == 0.5 and found["questions"] == 2 and found["samples"] == 2
    assert found["pass"] == {"1": 0.5, "2": 0.5} and found["majority"] == 0.5
    assert found["unparsed"] == found["truncated"] == 0.5 and found["finish"] == {"length": 2, "stop": 2}
    assert found["extraction"] == {"strict": 0.25, "lenient": 0.25, "none": 0.5}
    assert found["repetition"] == pytest.approx(1 - 1 / 11) and found["tokens"] == 30
    strictly = grade(job, samples, STRICT)
    assert [(was.sample, was.correct, now.correct) for was, now in changed(graded, strictly)] == [(1, 1.0, 0.0)]
    write_graded(tmp_path / "graded.jsonl", graded)
    assert read_graded(tmp_path / "graded.jsonl") == graded


def test_a_grading_that_fails_is_tried_once_more(tmp_path, monkeypatch):
    """And one that fails again is counted, and wrong."""
    job, submitted = job_of(tmp_path, MATH), []

    class Failing(Verifier):
        def submit(self, ticket, record, response, extractor=""):
            submitted.append(ticket)
            if ticket == 1 or submitted.count(ticket) == 1:
                record = record | {"reward": "gym"}  # without metadata: it raises
            super().submit(ticket, record, response, extractor)

    monkeypatch.setattr(grading, "Verifier", Failing)
    graded = grade(job, [sample_of(job, 0, n, r"\boxed{7}") for n in range(2)], LENIENT)
    assert submitted == [0, 1, 0, 1] and [one.status for one in graded] == ["ok", "crash"]
    assert [one.correct for one in graded] == [1.0, 0.0] and summary(job, graded, LENIENT)["grading_failed"] == 0.5


def test_letters_that_were_given_for_each_right_one(tmp_path):
    """With Evalchemy's order the right letter is always the same, and a model that says D is always right."""
    lines = [{"id": str(n), "question": f"{n}?", "choices": list("wxyz"), "answer": n % 4} for n in range(8)]
    lines = [line | {"reward": "choice"} for line in lines]
    shuffled = job_of(tmp_path, lines)
    shuffled = replace(shuffled, task=replace(shuffled.task, reward="choice"))
    evalchemy = replace(shuffled, settings=EvaluateSettings(gpqa=GpqaSettings(options="evalchemy")))
    says_d = [sample_of(shuffled, n, 0, r"\boxed{D}") for n in range(8)]
    assert letters(grade(evalchemy, says_d, LENIENT)) == {"D": {"D": 8, "none": 0}}
    found = letters(grade(shuffled, says_d, LENIENT))
    assert set(found) > {"D"} and sum(row["D"] for row in found.values()) == 8


def test_samples_come_back_and_those_of_another_case_do_not(tmp_path):
    job = job_of(tmp_path, MATH)
    sample = sample_of(job, 0, 0, "é \u2028 x")
    case = {"model": "m", "sampling.seed": 0}
    with kept.Writer(job.out, 3, case) as writer:
        writer.keep(sample)
    with kept.Writer(job.out, 0, case) as writer:
        writer.keep(replace(sample, sample=1))
    torn = tmp_path / "mine.samples"
    torn.write_text(torn.read_text() + '{"question": "a", "ke')
    assert set(kept.read(job.out, case)) == {(sample.key, 0), (sample.key, 1)}
    kept.take_over(job.out, case, kept.read(job.out, case).values())
    assert [file.name for file in tmp_path.glob("mine.samples*")] == ["mine.samples"]
    assert kept.read(job.out, case)[sample.key, 0] == sample
    with pytest.raises(ValueError, match=r"holds samples of an unfinished generation with another model; .*--out"):
        kept.read(job.out, case | {"model": "n"})
    with pytest.raises(ValueError, match=r"with sampling.seed=0, not 1"):
        kept.read(job.out, case | {"sampling.seed": 1})
    torn.write_text(torn.read_text() + '{"question": "a"}\n')
    with pytest.raises(ValueError, match=r"mine\.samples, line 4: no sample"):
        kept.read(job.out, case)


def test_a_result_grows_by_task_and_is_of_one_model(tmp_path):
    job, model = job_of(tmp_path, MATH), {"hf": "models/x", "identity": "1"}
    with pytest.raises(ValueError, match="holds no sample of mine's questions"):
        samples_of(job)
    with kept.Writer(job.out, 0, {}) as writer:
        for number in range(3):
            writer.keep(sample_of(job, 0, number, "7"))
    (tmp_path / "results.json").write_text(json.dumps({"model": model, "tasks": {"gpqa": {"score": {"value": 0.5}}}}))
    results = score(tmp_path, EvaluateSettings(grading=LENIENT, sampling={"samples": 2}), [job], model)
    assert set(results["tasks"]) == {"gpqa", "mine"} and results["tasks"]["mine"]["score"]["value"] == 1.0
    assert results == json.loads((tmp_path / "results.json").read_text())
    with pytest.raises(ValueError, match=r"results\.json is of another model, models/x; choose another --out"):
        earlier_tasks(tmp_path, model | {"identity": "2"})


def words():
    tokenizer = Backend(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return Tokenizer(tokenizer)


WORDS = ["<eos>", "<think>", "</think>", "User:", "x", "7"]


@pytest.mark.parametrize(
    "prompt, response, ends, text",
    [
        ("x", "<think> x User: x </think> 7 User:", 8, "<think>xUser:x</think>7"),
        ("x", "<think> x User: x", None, "<think>xUser:x"),
        ("x <think>", "x User: x", None, "xUser:x"),
        ("x <think>", "x User: </think> 7 User:", 5, "xUser:</think>7"),
        ("x", "7 User:", 2, "7"),
        ("User: x", "7 x", None, "7x"),
    ],
)
def test_a_stop_text_counts_behind_the_reasoning_only(prompt, response, ends, text):
    tokenizer = words()
    stop = StopTexts(tokenizer, ["User:"])
    ids, asked = [WORDS.index(word) for word in response.split()], [WORDS.index(word) for word in prompt.split()]
    reached = [n for n in range(1, len(ids) + 1) if stop.reached(ids[:n]) and stop.reached_after_think(asked, ids[:n])]
    assert (reached or [None])[0] == (ends if ends is None else len(ids))
    done = Completion(0, 0, tuple(ids), np.zeros(len(ids), np.float32), "stop", False)
    assert kept.response_of(tokenizer, done, prompt, ["User:"]) == text


def test_the_first_questions_alone(tmp_path):
    job = job_of(tmp_path, MATH, evaluate=EvaluationSettings(limit=1))
    assert [problem.id for problem in job.problems] == ["a"]
