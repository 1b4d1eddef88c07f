"""Which model it is: every byte of the weights counts, where and when it was written does not."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny.hf_models import save_hf

from prism_mcore.checkpoint.durable import MANIFEST
from prism_mcore.convert import identity as identity_module
from prism_mcore.convert.identity import identity
from prism_mcore.convert.offline import export_checkpoint, import_hf, plan_export, plan_import


@pytest.fixture
def exported(tmp_path):
    """A directory with a manifest, and the checkpoint it is of."""
    save_hf("llama-3.1", tmp_path / "in", dtype=torch.bfloat16, max_shard_size="30KB")
    import_hf(plan_import(tmp_path / "in"), tmp_path / "ckpt")
    export_checkpoint(plan_export(tmp_path / "ckpt"), tmp_path / "out")
    return tmp_path


def flip(path, place):
    """One bit, and nothing that a file system says of the file but its time."""
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_a_copy_is_the_same_with_and_without_a_manifest(exported, monkeypatch):
    assert identity(exported / "in") == identity(exported / "out")
    copy = shutil.copytree(exported / "out", exported / "copy", copy_function=shutil.copyfile)  # times of its own
    assert identity(copy) == identity(exported / "out")
    os.utime(exported / "out" / MANIFEST)  # surely after the files
    read = []
    monkeypatch.setattr(identity_module, "describe", lambda path: read.append(path) or {"sha256": ""})
    identity(exported / "out")
    assert read == []  # what the manifest knows is not read again
    identity(exported / "in")
    assert len(read) > 2


@pytest.mark.parametrize("folder", ["in", "out"])
def test_every_byte_counts(exported, folder):
    before = {identity(exported / folder)}
    shards = sorted((exported / folder).glob("*.safetensors"))
    for shard in shards:
        size = shard.stat().st_size
        for place in (size - 1, size // 2, size // 3):
            flip(shard, place)
            before.add(identity(exported / folder))
    assert len(before) == 1 + 3 * len(shards)


def test_config_and_tokenizer_count_and_a_readme_does_not(exported):
    folder = exported / "in"
    before = identity(folder)
    (folder / "README.md").write_text("x")
    (folder / "optimizer.bin").write_text("x")
    assert identity(folder) == before
    (folder / "tokenizer.json").write_text("{}")
    with_tokenizer = identity(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert len({before, with_tokenizer, identity(folder)}) == 3


def test_a_manifest_that_does_not_fit_is_not_believed(exported):
    folder = exported / "out"
    before = identity(folder)
    (folder / "manifest.json").write_text("{}")
    assert identity(folder) == before
    (folder / "manifest.json").unlink()
    assert identity(folder) == before


def test_a_checkpoint_has_one_too(exported):
    step = exported / "ckpt" / "step_00000000"
    before = identity(step)
    assert identity(shutil.copytree(step, exported / "copy")) == before
    flip(step / "__0_0.safetensors", step.joinpath("__0_0.safetensors").stat().st_size // 2)
    os.utime(step / "__0_0.safetensors")
    assert identity(step) != before


def test_the_same_size_and_names_are_not_the_same_model(exported):
    """Fine-tuned weights: header, size, beginning and end as before."""
    (shard, *_) = sorted((exported / "in").glob("*.safetensors"))
    before = identity(exported / "in")
    weights = load_file(shard)
    name = list(weights)[len(weights) // 2]
    weights[name].view(-1)[weights[name].numel() // 2] += 1
    save_file(weights, shard, metadata={"format": "pt"})
    assert identity(exported / "in") != before
