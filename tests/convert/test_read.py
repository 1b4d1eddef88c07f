"""A directory that can be read in two ways is refused, and what follows from config.json is read past."""

import json
import logging
import shutil

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny.hf_models import save_hf

from prism_mcore.convert.manifest import verify
from prism_mcore.convert.names import ExchangeError
from prism_mcore.convert.offline import export_checkpoint, import_hf, plan_export, plan_import
from prism_mcore.convert.read import read_directory

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save_hf("llama-3.1", folder / "single", dtype=torch.bfloat16)
    save_hf("llama-3.1", folder / "sharded", dtype=torch.bfloat16, max_shard_size="30KB")
    return folder


@pytest.fixture
def single(good, tmp_path):
    return shutil.copytree(good / "single", tmp_path / "hf")


@pytest.fixture
def sharded(good, tmp_path):
    return shutil.copytree(good / "sharded", tmp_path / "hf")


def refused(folder, *words):
    with pytest.raises(ExchangeError) as error:
        source = read_directory(folder)
        source.tensors(source.spec())
    for word in words:
        assert word in str(error.value)


# --- ambiguous --------------------------------------------------------------------------------------------------------


def test_a_single_file_beside_the_index_of_others_is_refused(good, sharded):
    shutil.copy(good / "single" / SINGLE, sharded)
    refused(sharded, f"{sharded}/{SINGLE}", f"{sharded}/{INDEX}", "model-00001-of-00004.safetensors")


def test_an_index_that_names_the_single_file_and_others_is_refused(good, sharded):
    shutil.copy(good / "single" / SINGLE, sharded)
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][NORM] = SINGLE
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, f"{sharded}/{SINGLE}", f"{sharded}/{INDEX}")


def test_an_index_of_the_single_file_alone_is_one_reading(single):
    names = load_file(single / SINGLE).keys()
    (single / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))
    assert read_directory(single).names == set(names)


def test_an_index_of_the_single_file_that_says_something_else_is_refused(single):
    names = load_file(single / SINGLE).keys() - {NORM}
    (single / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))
    refused(single, SINGLE, INDEX, NORM)


def test_a_shard_that_the_index_does_not_name_is_refused(sharded):
    shutil.copy(sharded / "model-00001-of-00004.safetensors", sharded / "model-00001-of-00003.safetensors")
    refused(sharded, f"{sharded}/{INDEX} does not name model-00001-of-00003.safetensors")


def test_shards_without_an_index_beside_a_single_file_are_refused(good, single):
    for number in (1, 2):
        shutil.copy(good / "sharded" / f"model-0000{number}-of-00004.safetensors", single)
    refused(single, f"{single}/model-00001-of-00004.safetensors", f"{single}/{SINGLE}", "without an index")


def test_other_weights_that_transformers_leaves_alone_are_left_alone(sharded):
    """Such as those that Mistral publishes beside the shards, and pickles of the same weights."""
    shutil.copy(sharded / "model-00001-of-00004.safetensors", sharded / "consolidated.safetensors")
    (sharded / "pytorch_model.bin").write_bytes(b"")
    assert len(read_directory(sharded).shards) == 4


def test_an_adapter_beside_the_weights_is_refused(single):
    (single / "adapter_config.json").write_text("{}")
    refused(single, f"{single}/adapter_config.json", "adapter")


def test_a_tensor_in_two_shards_is_refused(sharded):
    shards = [sharded / f"model-0000{number}-of-00004.safetensors" for number in (1, 4)]
    first, last = (load_file(shard) for shard in shards)
    name = next(iter(first))
    save_file(last | {name: first[name]}, shards[1])
    refused(sharded, "model-00004-of-00004.safetensors", name, "says nothing")


def test_a_name_that_is_twice_in_the_index_is_refused(sharded):
    text = (sharded / INDEX).read_text()
    twice = text.replace('"weight_map": {', f'"weight_map": {{"{NORM}": "model-00001-of-00004.safetensors",')
    assert twice != text
    (sharded / INDEX).write_text(twice)
    refused(sharded, INDEX, f"{NORM} is there twice")


def header_of(file, change):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length].decode()).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


HEADERS = {
    "twice": (
        lambda text: text.replace("{", f'{{"{NORM}":{{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}},', 1),
        "twice",
    ),
    "no list": (lambda text: "[]" + " " * (len(text) - 2), "cannot be read"),
    "too deep": (lambda text: "[" * len(text) * 50, "cannot be read"),
    "text for a shape": (lambda text: text.replace('"shape":[', '"shape":["1",', 1), "not whole numbers"),
    "negative": (lambda text: text.replace('"data_offsets":[0,', '"data_offsets":[-1,', 1), "not whole numbers"),
    "three offsets": (lambda text: text.replace('"data_offsets":[0,', '"data_offsets":[0,0,', 1), "cannot be read"),
    "true": (lambda text: text.replace('"data_offsets":[0,', '"data_offsets":[false,', 1), "not whole numbers"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_is_none_is_one_message(single, what):
    change, word = HEADERS[what]
    header_of(single / SINGLE, change)
    refused(single, f"{single}/{SINGLE}", word)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b'{"weight_map": 3}', b"[" * 100_000])
def test_an_index_that_is_none_is_one_message(sharded, content):
    (sharded / INDEX).write_bytes(content)
    refused(sharded, f"{sharded}/{INDEX} is not an index")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b"{", b"[" * 100_000, b'{"a": {"__float__": "x"}}'])
def test_a_config_that_is_none_is_one_message(single, content):
    (single / "config.json").write_bytes(content)
    refused(single, f"{single}/config.json")


# --- buffers ----------------------------------------------------------------------------------------------------------


def with_buffers(folder):
    """As earlier versions of transformers saved it."""
    inverse, done = 1.0 / 100.0 ** (torch.arange(0, 16, 2) / 16), set()
    for file in sorted(folder.glob("*.safetensors")):
        weights = load_file(file)
        layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.")} - done
        done |= layers
        buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": inverse.clone() for layer in layers}
        save_file(weights | buffers, file, metadata={"format": "pt"})
        if (folder / INDEX).is_file():
            index = json.loads((folder / INDEX).read_text())
            index["weight_map"] |= dict.fromkeys(buffers, file.name)
            (folder / INDEX).write_text(json.dumps(index))
    return folder


def weights_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_weights(want, got):
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_buffers_that_follow_from_the_config_are_read_past_with_a_note(good, tmp_path, caplog, kind):
    """Into a checkpoint and out again: every weight as it was, the buffers gone from files and index."""
    folder = with_buffers(shutil.copytree(good / kind, tmp_path / "hf"))
    with caplog.at_level(logging.WARNING):
        import_hf(plan_import(folder), tmp_path / "ckpt")
    assert "rotary_emb.inv_freq" in caplog.text and "read past" in caplog.text
    export_checkpoint(plan_export(tmp_path / "ckpt"), tmp_path / "out")
    assert verify(tmp_path / "out") == []
    assert_same_weights(weights_of(good / kind), weights_of(tmp_path / "out"))
    assert "inv_freq" not in "".join(path.read_text() for path in (tmp_path / "out").glob("*.index.json"))


def running(groups, path, out):
    """A model in fp32 in and out; what was logged."""
    from prism_mcore.convert.online import load_hf, save_hf
    from prism_mcore.model.build import build_chunks
    from prism_mcore.model.ops import Ops
    from prism_mcore.model.spec import read_spec
    from prism_mcore.model.split import split_layers

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("prism_mcore").addHandler(handler)
    spec, cpu = read_spec(path), torch.device("cpu")
    split = split_layers(spec, 1, 1, seq_len=16)
    chunks = build_chunks(spec, split, groups, Ops({}, cpu), dtype=torch.float32, device=cpu)
    load_hf(path, chunks, groups)
    save_hf(chunks, groups, out, read_directory(path))
    logging.getLogger("prism_mcore").removeHandler(handler)
    return said


def test_a_running_model_reads_past_them_and_says_what_it_rounds(good, tmp_path):
    folder = with_buffers(shutil.copytree(good / "sharded", tmp_path / "hf"))
    (said,) = run_ranks(1, running, folder, tmp_path / "out")
    assert_same_weights(weights_of(good / "sharded"), weights_of(tmp_path / "out"))
    assert any("inv_freq" in line and "read past" in line for line in said)
    assert any("are rounded to the dtype" in line and str(tmp_path / "out") in line for line in said)


def test_another_tensor_that_nothing_reads_is_refused_and_says_what_to_do(single):
    weights = load_file(single / SINGLE)
    save_file(weights | {"model.layers.0.self_attn.masked_bias": torch.zeros(1)}, single / SINGLE)
    refused(single, f"{single}/{SINGLE}", "masked_bias", "a copy of the files without it")
