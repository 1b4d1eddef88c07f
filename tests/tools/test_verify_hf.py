"""tools/verify_hf.py: agreement passes in a split layout, and what differs is found where it begins."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny.hf_models import SEQ_LEN, save_hf

from prism_mcore.plan import host

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import verify_hf


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Nemotron-H as its own files have it: attention_head_dim, which transformers does not read, and backbone.*."""
    folder = tmp_path_factory.mktemp("hf")
    save_hf("nemotron-h", folder, older_keys=True, max_shard_size="60KB")
    return folder


def run(capsys, *arguments):
    code = verify_hf.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def verdicts(text):
    """{output: ok or differs} of the printed table."""
    return dict(re.findall(r"│ ([\w -]+?) +│.*│ (ok|differs) +│", text))


def test_all_outputs_agree_in_a_split_layout(model, capsys, tmp_path):
    (tmp_path / "tokens.json").write_text(
        json.dumps([list(range(SEQ_LEN - 1))])
    )  # odd: padded for sequence parallelism
    layout = ["--tp", 2, "--pp", 2, "--sequence-parallel"]
    code, text = run(capsys, model, *layout, "--tokens", tmp_path / "tokens.json")
    assert code == 0, text
    assert list(verdicts(text)) == [
        "embedding",
        *(f"sub-layer {i} {kind}" for i, kind in enumerate(["mamba", "mlp", "mamba", "attention", "mlp", "mamba"])),
        "logits",
    ]
    assert "PASS" in text


def test_a_difference_is_found_where_it_begins(model, capsys, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    for shard in tmp_path.glob("*.safetensors"):
        tensors = load_file(shard)
        if (weight := tensors.get("backbone.layers.3.mixer.o_proj.weight")) is not None:
            weight[0, 0] += 1e-2
            save_file(tensors, shard, {"format": "pt"})

    run_ranks = verify_hf._run_ranks
    monkeypatch.setattr(verify_hf, "_run_ranks", lambda hf, *rest: run_ranks(tmp_path, *rest))  # ours alone reads it
    code, text = run(capsys, model, "--pp", 2, "--length", SEQ_LEN)
    assert code == 1
    assert "FAIL: 4 of 8 outputs differ, the first is sub-layer 3 attention" in text
    assert list(verdicts(text).values()) == ["ok"] * 4 + ["differs"] * 4


def test_a_model_that_does_not_fit_is_refused_before_anything_starts(model, capsys, monkeypatch):
    monkeypatch.setattr(host, "free_memory", lambda: 10**9)
    code, text = run(capsys, model, "--tp", 2)
    assert code == 2 and "on 2 processes needs some" in text and "this machine has 1 GB free; free memory, or" in text


def test_bad_input_gives_one_message(model, capsys, tmp_path):
    code, text = run(capsys, model, "--tp", 3)
    assert code == 2 and "parallel.tp=3 does not divide the model's 4 attention heads" in text
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    code, text = run(capsys, tmp_path)
    assert code == 2 and shard.name in text
