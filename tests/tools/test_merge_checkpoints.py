"""Merging checkpoints: exact averages in the first one's dtypes and files, and refusals that name the difference."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny.hf_models import save_hf

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import merge_checkpoints


def tensors(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models of one shape: bf16 in shards, bf16 in one file, fp32 in shards of another size."""
    folder = tmp_path_factory.mktemp("models")
    for seed, (dtype, size) in enumerate([(torch.bfloat16, "60KB"), (torch.bfloat16, "1GB"), (torch.float32, "80KB")]):
        save_hf("granite-4.0-h-micro", folder / "abc"[seed], dtype=dtype, max_shard_size=size, seed=seed)
    return folder


def run(*arguments):
    return merge_checkpoints.main([str(argument) for argument in arguments])


def test_average_of_three_in_the_layout_of_the_first(models, tmp_path):
    weights = {"a": 0.15, "b": 0.35, "c": 0.5}
    assert run(*(f"{models / name}:{w}" for name, w in weights.items()), "--out", tmp_path / "out") == 0
    parts = {name: tensors(models / name) for name in weights}
    merged = tensors(tmp_path / "out")
    assert merged.keys() == parts["a"].keys()
    for name, tensor in merged.items():
        exact = sum(parts[model][name].double() * weight for model, weight in weights.items())
        assert tensor.dtype == torch.bfloat16
        # one rounding to bf16, or its neighbour where fp32's rounding crosses the middle
        assert ((tensor.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-7).all(), name
    files = {file.name for file in (models / "a").iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files | {"manifest.json"}
    for side_file in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        assert (tmp_path / "out" / side_file).read_bytes() == (models / "a" / side_file).read_bytes()


@pytest.mark.parametrize("name", ["a", "c"])
def test_a_model_merged_with_itself_is_itself_to_the_byte(models, tmp_path, name):
    assert run(f"{models / name}:1", f"{models / name}:3", "--out", tmp_path / "out") == 0
    for file in (models / name).iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_weights_that_do_not_sum_to_one_are_divided_and_said_so(models, tmp_path, capsys):
    assert run(f"{models / 'a'}:1", f"{models / 'b'}:3", "--out", tmp_path / "out") == 0
    assert "the weights sum to 4, not 1" in " ".join(capsys.readouterr().out.split())
    a, b, merged = (
        tensors(folder)["model.norm.weight"].float() for folder in (models / "a", models / "b", tmp_path / "out")
    )
    assert torch.equal(merged, (0.25 * a + 0.75 * b).bfloat16().float())


def test_like_gives_dtypes_shards_and_side_files(models, tmp_path):
    assert run(f"{models / 'a'}:0.5", f"{models / 'b'}:0.5", "--like", models / "c", "--out", tmp_path / "out") == 0
    assert {p.name for p in (tmp_path / "out").glob("*.safetensors")} == {
        p.name for p in (models / "c").glob("*.safe*s")
    }
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.float32}


def changed_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without(folder, name):
    kept = {n: t for n, t in load_file(folder / "model.safetensors").items() if n != name}
    save_file(kept, folder / "model.safetensors")


def reshaped(folder, name):
    every = load_file(folder / "model.safetensors")
    save_file(every | {name: every[name][1:].contiguous()}, folder / "model.safetensors")


def with_output(folder):
    every = load_file(folder / "model.safetensors")
    save_file(every | {"lm_head.weight": every["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")


def truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])


DIFFERENT = {
    "a multiplier": (lambda f: changed_config(f, residual_multiplier=0.75), "residual_multiplier is 0.75 and 0.5"),
    "a tensor less": (lambda f: without(f, "model.norm.weight"), "has no model.norm.weight"),
    "a tensor more": (with_output, "has lm_head.weight"),
    "another shape": (lambda f: reshaped(f, "model.norm.weight"), "model.norm.weight has the shape [47]"),
    "cut off": (truncated, "truncated"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_does_not_fit_is_refused_by_name(models, tmp_path, capsys, case):
    damage, message = DIFFERENT[case]
    shutil.copytree(models / "b", tmp_path / "other")
    damage(tmp_path / "other")
    assert run(f"{models / 'a'}:0.5", f"{tmp_path / 'other'}:0.5", "--out", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("checkpoint", ["base", "base:", "base:x", "base:-1", "base:0", "base:nan", ":1"])
def test_a_weight_is_needed(checkpoint, tmp_path, capsys):
    assert run(checkpoint, "--out", tmp_path / "out") == 1
    assert "DIR:WEIGHT" in capsys.readouterr().err


def test_nothing_is_overwritten(models, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert run(f"{models / 'a'}:1", "--out", tmp_path / "out") == 1
    assert "exists" in capsys.readouterr().err
