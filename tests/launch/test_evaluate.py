"""launch/evaluate.py for real: samples that no layout changes, that resume and grow, and verdicts given again."""

import importlib.machinery
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny.hf_models import save_hf
from tiny.prompt_files import write_prompts

from prism_mcore.data.token_file import TokenFileWriter
from prism_mcore.text import load_tokenizer

ROOT = Path(__file__).parents[2]
HOW = ["precision.dtype=fp32", "sampling.max_tokens=12", "sampling.temperature=1", "grading.workers=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its tokenizer, and questions of which an answer may be right by chance."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_hf("granite-4.0-h-micro", folder / "hf", max_position_embeddings=512)
    write_prompts(folder / "hf")
    lines = [
        {"id": str(n), "question": f"w{n} w{n + 9}", "choices": [f"w{n + k}" for k in range(4)], "answer": n % 4}
        for n in range(7)
    ]
    (folder / "problems").mkdir()
    (folder / "problems/gpqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def evaluate(ranks, folder, out, *more, tasks="gpqa", works=True):
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    files = ["--hf", folder / "hf", "--tasks", tasks, "--out", out]
    where = [f"evaluate.problems={folder / 'problems'}", "evaluate.partial=true"]
    command = [sys.executable, *start, "launch/evaluate.py", *files, *where, *HOW, *more]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode == 0) == works, done.stderr
    return done.stdout if works else done


def samples(out):
    lines = [json.loads(line) for line in (out / "gpqa.samples").read_text().splitlines()[1:]]
    return {(line["question"], line["sample"]): line for line in lines}


def test_samples_depend_on_no_layout_resume_and_grow(folder, tmp_path, capsys, monkeypatch):
    """Two of each question on one rank; torn, then four on two replicas of one slot; four on TP 2."""
    first, grown, parallel = tmp_path / "first", tmp_path / "grown", tmp_path / "parallel"
    evaluate(1, folder, first, "sampling.samples=2")
    written = (first / "gpqa.samples").read_text()
    grown.mkdir()
    (grown / "gpqa.samples").write_text(written[: len(written) // 2])
    kept = written[: len(written) // 2].count("\n") - 1
    text = evaluate(2, folder, grown, "sampling.samples=4", "generate.slots=1")
    assert f", {kept} from before" in text and not list(grown.glob("*.lock")) and not list(grown.glob("*.samples.*"))
    evaluate(2, folder, parallel, "sampling.samples=4", "parallel.tp=2")
    a, b, c = samples(first), samples(grown), samples(parallel)
    assert len(a) == 14 and len(b) == 28 and b.keys() == c.keys()
    for place, sample in b.items():
        for other in (a.get(place, sample), c[place]):
            assert other["logprob"] == pytest.approx(sample["logprob"], rel=1e-4)
            assert other | {"logprob": 0} == sample | {"logprob": 0}
    assert len({tuple(sample["tokens"]) for sample in b.values()}) > 20
    verdicts = [json.loads(line) for line in (grown / "gpqa.verdicts.jsonl").read_text().splitlines()]
    results = json.loads((grown / "results.json").read_text())["tasks"]["gpqa"]
    assert results["score"]["value"] == pytest.approx(sum(v["correct"] for v in verdicts) / 28)
    assert results["published"] == 198 and results["questions"] == 7 and results["samples"] == 4

    before = {(v["question"], v["sample"]): v["correct"] for v in verdicts}
    assert run_here(monkeypatch, "--rescore", "--out", grown, "grading.extractor=strict") == 0
    after = [json.loads(line) for line in (grown / "gpqa.verdicts.jsonl").read_text().splitlines()]
    assert all(v["extraction"] != "lenient" for v in after) and any(v["extraction"] == "lenient" for v in verdicts)
    changes = sum(before[v["question"], v["sample"]] != v["correct"] for v in after)
    assert changes > 0 and f"GPQA-Diamond: {changes} verdicts changed" in capsys.readouterr().out

    with TokenFileWriter(tmp_path / "corpus", np.uint16) as writer:
        text = load_tokenizer(folder / "hf").encode("w40 w3 w12 w40")  # the fourth question
        writer.add(np.array(text), np.array([len(text)]))
    again = ["--rescore", "--out", grown, f"contamination.tokens=[{tmp_path}/corpus]", "contamination.ngram=2"]
    assert run_here(monkeypatch, *again, "grading.extractor=lenient") == 0
    assert "1 of 7 questions are in the training data; without them" in capsys.readouterr().out
    found = json.loads((grown / "results.json").read_text())["tasks"]["gpqa"]["contamination"]
    clean = [v["correct"] for v in verdicts if v["question"] != "3"]
    assert found["hits"] == ["3"] and found["score_without_hits"]["value"] == pytest.approx(sum(clean) / len(clean))

    save_hf("granite-4.0-h-micro", tmp_path / "hf", max_position_embeddings=512, seed=1)
    write_prompts(tmp_path / "hf")
    assert launched(monkeypatch, folder, grown, hf=tmp_path / "hf") == 2
    error = capsys.readouterr().err
    assert "results.json is of another model" in error and error.count("\n") == 1
    (grown / "results.json").unlink()
    assert launched(monkeypatch, folder, grown, hf=tmp_path / "hf") == 2
    assert "gpqa.samples holds samples of an unfinished generation with another model" in capsys.readouterr().err


WRONG = {
    "no such task": ("gqpa", [], "--tasks gqpa: no such task; known are aime24,"),
    "a file that is missing": ("aime24", [], "there is no {folder}/problems/aime24.jsonl; make it with `python tools/"),
    "another number of rows": ("gpqa", ["evaluate.partial=false"], "has 7 questions; GPQA-Diamond has 198"),
    "twice": ("gpqa,gpqa", [], "needed: at least one task, each once"),
    "nothing": ("", [], "needed: --hf DIR and --tasks T,... or --lm-eval T,...; or"),
    "a setting of another": ("gpqa", ["sampling.ignore_eos=true"], "ignore_eos is a setting of launch/rl.py and"),
    "a pipeline": ("gpqa", ["parallel.vpp=2"], "generated on one stage; use pp=1"),
    "too long": ("own-code", [], "question code-02: the prompt has 72 tokens; needed: fewer than"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_gives_one_message(folder, tmp_path, capsys, monkeypatch, name):
    tasks, more, message = WRONG[name]
    hf = folder / "hf"
    if name == "too long":
        save_hf("llama-3.1", tmp_path / "hf")
        hf = write_prompts(tmp_path / "hf")
    assert launched(monkeypatch, folder, tmp_path / "out", *more, tasks=tasks, hf=hf) == 2
    error = capsys.readouterr().err
    assert message.format(folder=folder) in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_empty_file_of_prompts_is_named(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.jsonl").write_text("\n")
    assert launched(monkeypatch, folder, tmp_path / "out", tasks=str(tmp_path / "mine.jsonl")) == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path / 'mine.jsonl'} has no questions; needed: one JSON object per line\n"
    )


def test_a_rescore_needs_a_result_and_changes_grading_alone(tmp_path, capsys, monkeypatch):
    assert run_here(monkeypatch, "--rescore", "--out", tmp_path) == 2
    assert "has no results.json and settings.yaml: no evaluation was finished there" in capsys.readouterr().err
    (tmp_path / "results.json").write_text('{"model": {}, "tasks": {}}')
    (tmp_path / "settings.yaml").write_text("{}")
    assert run_here(monkeypatch, "--rescore", "--out", tmp_path, "sampling.seed=3") == 2
    assert "--rescore sampling.seed=3: needed: settings of grading" in capsys.readouterr().err


def test_what_fails_on_one_replica_is_said(folder, tmp_path):
    """Memory for a short prompt, not for the long one, which the second replica has."""
    lines = [
        {"prompt": "w1", "answer": "A", "reward": "choice"},
        {"prompt": "w2 " * 300, "answer": "A", "reward": "choice"},
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    how = ["evaluate.prompt=plain", "generate.cache_gb=0.00012"]
    done = evaluate(2, folder, tmp_path / "out", *how, tasks=tmp_path / "mine.jsonl", works=False)
    assert done.returncode != 0 and "error: rank 1: generate.cache_gb: 0.00012 GB" in done.stderr


def test_lm_eval_is_asked_for_where_it_is_missing(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    files = ["--hf", folder / "hf", "--lm-eval", "hellaswag", "--out", tmp_path / "out"]
    launcher = loaded(monkeypatch, *files)
    assert launcher.main() == 2
    assert capsys.readouterr().err == "error: --lm-eval needs lm_eval: pip install 'prism_mcore[lm-eval]'\n"


def test_the_dry_run_says_what_is_to_do(folder, tmp_path, capsys, monkeypatch):
    assert launched(monkeypatch, folder, tmp_path / "out", "--dry-run", "sampling.samples=3") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "gpqa 7/198 3 0/21 32,768 0.7 1" in text and "Evalchemy's T is 0.7" in text
    assert not (tmp_path / "out").exists()


def launched(monkeypatch, folder, out, *more, tasks="gpqa", hf=None):
    files = ["--hf", hf or folder / "hf", "--tasks", tasks, "--out", out, f"evaluate.problems={folder / 'problems'}"]
    return run_here(monkeypatch, *files, "evaluate.partial=true", *more)


def run_here(monkeypatch, *arguments):
    return loaded(monkeypatch, *arguments).main()


def loaded(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    loader = importlib.machinery.SourceFileLoader("evaluate_launcher", str(ROOT / "launch" / "evaluate.py"))
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("evaluate_launcher", loader))
    loader.exec_module(module)
    return module
