"""The manifest of an export knows every file and every tensor, and says which one is not as it was."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny.hf_models import save_hf

from prism_mcore.convert.manifest import verify
from prism_mcore.convert.read import HFTensors, read_directory
from prism_mcore.convert.write import write_directory


@pytest.fixture
def export(tmp_path):
    """A directory copied tensor by tensor."""
    save_hf("granite-4.0-h-micro", tmp_path / "in", dtype=torch.float16, max_shard_size="60KB")
    source = read_directory(tmp_path / "in")
    with HFTensors(source) as reader:
        write_directory(tmp_path / "out", source, reader.read)
    return tmp_path / "out"


def test_hashes_are_of_files_and_of_tensors_alone(export):
    manifest = json.loads((export / "manifest.json").read_text())
    files = {path.name for path in export.iterdir()} - {"manifest.json"}
    assert manifest["files"].keys() == files
    for name, record in manifest["files"].items():
        content = (export / name).read_bytes()
        assert record == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert len(manifest["tensors"]) == 3
    for name, records in manifest["tensors"].items():
        tensors = load_file(export / name)
        assert records.keys() == tensors.keys()
        for tensor, record in records.items():
            content = tensors[tensor].contiguous().flatten().view(torch.uint8).numpy().tobytes()
            assert record["sha256"] == hashlib.sha256(content).hexdigest()
            assert (record["dtype"], record["shape"]) == ("F16", list(tensors[tensor].shape))


def test_a_good_export_has_no_problems(export):
    assert verify(export) == []


def test_one_bit_is_found_and_its_tensor_named(export):
    shard = export / "model-00002-of-00003.safetensors"
    name, entry = list(read_directory(export).shards[shard.name].entries.items())[3]
    content = bytearray(shard.read_bytes())
    content[int.from_bytes(content[:8], "little") + 8 + entry.end - 1] ^= 1
    shard.write_bytes(content)
    assert verify(export) == [
        f"{shard} is damaged: its SHA-256 is not the manifest's",
        f"{shard}: {name} is not the tensor that was exported",
    ]


@pytest.mark.parametrize("file", ["config.json", "model-00001-of-00003.safetensors", "model.safetensors.index.json"])
def test_a_file_that_is_gone_cut_or_added_is_named(export, file):
    (export / "added.txt").write_text("x")
    assert verify(export) == [f"{export}/added.txt is not in the manifest"]
    (export / "added.txt").unlink()
    (export / file).write_bytes((export / file).read_bytes()[:-1])
    assert f"{export / file} has" in verify(export)[0]
    (export / file).unlink()
    assert f"{export / file} is missing" in verify(export)[0]


def test_a_manifest_that_forgets_a_tensor_is_refused(export):
    manifest = json.loads((export / "manifest.json").read_text())
    del manifest["tensors"]["model-00001-of-00003.safetensors"]["model.embed_tokens.weight"]
    (export / "manifest.json").write_text(json.dumps(manifest))
    assert "model.embed_tokens.weight is in the file or in the manifest, not in both" in verify(export)[0]
