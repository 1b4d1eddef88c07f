"""A directory of random weights is one that transformers loads, the same for the same seed."""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from tiny.hf_models import save_hf

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import make_random_model


def test_transformers_loads_it_and_a_seed_gives_the_same(tmp_path):
    save_hf("nemotron-h", tmp_path / "like")
    config = tmp_path / "like" / "config.json"
    for name, seed in (("one", "3"), ("same", "3"), ("other", "4")):
        assert make_random_model.main([str(config), str(tmp_path / name), "--seed", seed]) == 0
    one, same, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "same", "other"))
    assert all(tensor.dtype == torch.bfloat16 and torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
    assert torch.isfinite(model(torch.arange(9)[None], use_cache=False).logits).all()
    assert json.loads((tmp_path / "one" / "config.json").read_text()) == json.loads(config.read_text())


def test_mistakes_are_one_line(tmp_path, capsys):
    assert make_random_model.main(["no-such-shape", str(tmp_path / "out")]) == 1
    assert "no-such-shape" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
