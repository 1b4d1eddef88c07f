"""launch/score.py with a real torchrun: transformers' log-probs and logits, and one message for bad input."""

import importlib.util
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny.gradients import close
from tiny.hf_models import save_hf

from prism_mcore.evaluate.files import ScoreFile, read_token_lists

ROOT = Path(__file__).parents[2]
VOCABULARY = 61


def score(ranks, *arguments):
    """Run the launcher on so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "launch/score.py"]
    return subprocess.run([*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model with one SSM group and an odd vocabulary, five sequences of odd length, and transformers' logits."""
    folder = tmp_path_factory.mktemp("score")
    model = save_hf("granite-4.0-h-micro", folder / "hf")
    tokens = torch.randint(VOCABULARY, (5, 19), generator=torch.Generator().manual_seed(2))
    (folder / "tokens.json").write_text(json.dumps(tokens.tolist()))
    with torch.no_grad():
        return folder, tokens, model(input_ids=tokens, use_cache=False).logits


def test_scores_are_those_of_transformers(case, tmp_path):
    """Five sequences over two replicas, in micro-batches of two on two virtual stages: neither divides."""
    folder, tokens, want = case
    out = tmp_path / "scores.safetensors"
    files = ["--hf", folder / "hf", "--tokens", folder / "tokens.json", "--out", out]
    layout = ["parallel.pp=2", "parallel.vpp=2", "precision.dtype=fp32", "--micro-batch", 2]
    done = score(4, *files, "--logits", *layout)
    assert done.returncode == 0, done.stderr
    scores = load_file(out)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in scores.items()} == {
        "logprobs": (torch.float32, (5, 18)),
        "logits": (torch.float32, (5, 19, VOCABULARY)),
    }
    assert close(scores["logits"], want)
    assert close(scores["logprobs"], want.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0])
    assert [path.name for path in tmp_path.iterdir()] == [out.name]  # nothing temporary stays


BAD_TOKENS = {
    "ragged": ([[1, 2, 3], [4, 5]], "sequence 1 has 2 tokens, sequence 0 has 3"),
    "out of the vocabulary": ([[1, 2], [3, 61]], "token 1 of sequence 1 is 61; needed: an id from 0 to 60"),
    "negative": ([[1, -2]], "token 1 of sequence 0 is -2"),
    "not whole": ([[1, 2.5]], "token 1 of sequence 0 is 2.5"),
    "true": ([[1, True]], "token 1 of sequence 0 is true"),
    "empty": ([], "there is no sequence"),
    "one token": ([[1]], "sequence 0 has 1 tokens"),
    "flat": ([1, 2, 3], "a JSON list of lists"),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_bad_tokens_are_named(tmp_path, name):
    rows, message = BAD_TOKENS[name]
    (tmp_path / "tokens.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError) as error:
        read_token_lists(tmp_path / "tokens.json", VOCABULARY)
    assert message in str(error.value) and "tokens.json" in str(error.value)


WRONG = {
    "half a JSON": ([], "[[1, 2,", "tokens.json is not JSON"),
    "brackets without end": ([], "[" * 100_000, "tokens.json is not JSON"),
    "a setting of another kind": (
        ["train.steps=3"],
        "[[1, 2]]",
        "train.steps is a setting of launch/midtrain.py and launch/rl.py",
    ),
    "a misspelt setting": (["parallel.tpp=2"], "[[1, 2]]", "nearest: parallel.tp"),
    "too few ranks": (["parallel.tp=2"], "[[1, 2]]", "1 ranks are not a multiple of tp*pp*cp=2"),
    "more tokens than positions": ([], json.dumps([[1] * 65]), "longer than the model's 64 positions"),
    "no folder for the output": (["--out", "none/there"], "[[1, 2]]", "there is no folder none"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_gives_one_message_and_no_file(tmp_path, capsys, monkeypatch, name):
    arguments, tokens, message = WRONG[name]
    save_hf("llama-3.1", tmp_path / "hf")
    (tmp_path / "tokens.json").write_text(tokens)
    files = ["--hf", tmp_path / "hf", "--tokens", tmp_path / "tokens.json", "--out", tmp_path / "scores"]
    monkeypatch.setattr(sys, "argv", ["score.py", *map(str, files), *arguments])
    assert load_launcher().main() == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("scores*"))


def load_launcher():
    spec = importlib.util.spec_from_file_location("score", ROOT / "launch" / "score.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_file_that_does_not_fit_is_refused_before_the_first_row(tmp_path):
    file = ScoreFile(tmp_path / "scores.safetensors", {"logits": (64, 2**14)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(OSError, match=r"4,194,\d+ bytes.*scores\.safetensors"):
            file.create()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
