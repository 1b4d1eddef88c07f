"""Checkpoints to Hugging Face and back through the command: to the byte, in one process, and nothing half-written."""

import errno
import importlib.util
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from tiny.hf_models import FAMILIES, save_hf

from prism_mcore.convert.read import read_directory
from prism_mcore.model.spec import read_spec

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def convert():
    """The command, run in this process: its exit code."""
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def assert_same_files(path, out):
    assert files(path).keys() == files(out).keys()
    assert [name for name, content in files(path).items() if content != files(out)[name]] == []
    assert (out / "manifest.json").is_file()


# Every dtype and both kinds of directory; every family and more layouts than one.
CASES = [
    ("llama-3.1", "bf16", "30KB", (1, 1)),
    ("llama-3.1", "fp16", "5GB", (2, 2)),
    ("mistral-v0.1", "fp32", "30KB", (2, 1)),
    ("mistral-small", "fp16", "30KB", (4, 1)),
    ("granite-3.3", "bf16", "5GB", (1, 3)),
    ("granite-4.0-micro", "fp32", "5GB", (2, 2)),
    ("granite-4.0-h-micro", "bf16", "60KB", (2, 2)),
    ("granite-4.0-h-micro", "fp16", "5GB", (1, 2)),
    ("nemotron-h", "fp32", "60KB", (2, 2)),
    ("nemotron-h", "bf16", "5GB", (2, 1)),
]


@pytest.mark.parametrize("small_blocks", [False, True])
@pytest.mark.parametrize(("family", "dtype", "shards", "layout"), CASES)
def test_there_and_back_without_a_process_group(
    convert, tmp_path, monkeypatch, family, dtype, shards, layout, small_blocks
):
    if small_blocks:  # real tensors are of many
        monkeypatch.setattr("prism_mcore.checkpoint.files.BLOCK_BYTES", 4096)
        monkeypatch.setattr("prism_mcore.convert.write.BLOCK_BYTES", 5000)
        monkeypatch.setattr("prism_mcore.convert.offline.PIECE_BYTES", 6000)
        monkeypatch.setattr("prism_mcore.convert.offline.FILE_BYTES", 20_000)
    save_hf(family, tmp_path / "in", dtype=DTYPES[dtype], max_shard_size=shards)
    (tmp_path / "in" / "tokenizer_config.json").write_bytes(b'{ "a":1}\r\n')
    tp, pp = layout
    assert convert("from-hf", tmp_path / "in", tmp_path / "ckpt", "--tp", tp, "--pp", pp, "--verify") == 0
    (tmp_path / "in").rename(tmp_path / "elsewhere")  # the directory itself is not needed any more
    assert convert("to-hf", tmp_path / "ckpt", tmp_path / "out", "--verify") == 0
    assert_same_files(tmp_path / "elsewhere", tmp_path / "out")
    written = {path.name for path in (tmp_path / "ckpt" / "step_00000000").glob("*.safetensors")}
    assert {int(name.split("_")[2]) for name in written} == set(range(tp * pp))
    assert len(written) > tp * pp if small_blocks else len(written) == tp * pp


def test_a_file_system_that_cannot_write_past_the_page_cache(convert, tmp_path, monkeypatch):
    """O_DIRECT is refused with EINVAL, as some file systems do: the same bytes through the cache."""
    save_hf("llama-3.1", tmp_path / "in", dtype=torch.bfloat16)
    plain_open = os.open

    def refusing_open(path, flags, *rest, **named):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        return plain_open(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refusing_open)
    assert convert("from-hf", tmp_path / "in", tmp_path / "ckpt") == 0
    assert convert("to-hf", tmp_path / "ckpt", tmp_path / "out", "--verify") == 0
    assert_same_files(tmp_path / "in", tmp_path / "out")


def test_a_directory_that_mixes_dtypes(convert, tmp_path):
    """Nemotron-H's A_log may be fp32 among bf16, and parts of one tensor of ours may differ."""
    model = save_hf("nemotron-h", tmp_path / "in", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "k_proj.weight")):
            parameter.data = parameter.data.float() + 1e-4
    model.save_pretrained(tmp_path / "in")
    assert {t.dtype for t in load_file(tmp_path / "in" / "model.safetensors").values()} == {
        torch.bfloat16,
        torch.float32,
    }
    assert convert("from-hf", tmp_path / "in", tmp_path / "ckpt") == 0
    assert convert("to-hf", tmp_path / "ckpt", tmp_path / "out") == 0
    assert_same_files(tmp_path / "in", tmp_path / "out")


# --- with running models ----------------------------------------------------------------------------------------------


def build(groups, path, dtype):
    from prism_mcore.model.build import build_chunks
    from prism_mcore.model.ops import Ops
    from prism_mcore.model.split import split_layers

    spec, cpu = read_spec(path), torch.device("cpu")
    split = split_layers(spec, groups.pp_size, groups.vpp, seq_len=16)
    return build_chunks(spec, split, groups, Ops({}, cpu), dtype=dtype, device=cpu)


def load_imported(groups, checkpoint, path):
    """This rank's weights, loaded as `model.init` does."""
    from prism_mcore.checkpoint.load import load_weights

    chunks = build(groups, path, torch.bfloat16)
    for chunk in chunks:
        for tensor in chunk.parameters():
            tensor.data.fill_(7.0)
    load_weights(checkpoint, chunks, groups)
    return [{name: tensor.detach() for name, tensor, _ in chunk.table()} for chunk in chunks]


def load_directory(groups, path):
    from prism_mcore.convert.online import load_hf

    chunks = build(groups, path, torch.bfloat16)
    load_hf(path, chunks, groups)
    return [{name: tensor.detach() for name, tensor, _ in chunk.table()} for chunk in chunks]


@pytest.mark.parametrize("written", [(1, 1), (2, 2)])
@pytest.mark.parametrize("family", ["llama-3.1", "granite-4.0-h-micro", "nemotron-h"])
def test_a_run_starts_from_an_import_as_from_the_directory(convert, tmp_path, family, written):
    save_hf(family, tmp_path / "in", dtype=torch.bfloat16)
    tp, pp = written
    assert convert("from-hf", tmp_path / "in", tmp_path / "ckpt", "--tp", tp, "--pp", pp) == 0
    step = tmp_path / "ckpt" / "step_00000000"
    for world_size, degrees in ((1, {}), (4, {"tp": 2, "pp": 2})):
        got = run_ranks(world_size, load_imported, step, tmp_path / "in", **degrees)
        want = run_ranks(world_size, load_directory, tmp_path / "in", **degrees)
        for ours, theirs in zip(got, want, strict=True):
            for chunk, reference in zip(ours, theirs, strict=True):
                assert chunk.keys() == reference.keys()
                assert [n for n, tensor in chunk.items() if not torch.equal(tensor, reference[n])] == []


def train_and_save(groups, path, folder, dtype, init, shift=0.0):
    """A checkpoint with an optimizer whose fp32 masters are away from the weights by `shift`, as after small steps."""
    from prism_mcore.checkpoint.save import Checkpoints
    from prism_mcore.convert.online import load_hf
    from prism_mcore.train.optimizer import build_optimizer, wrap
    from prism_mcore.train.settings import CheckpointSettings, OptimizerSettings

    chunks = build(groups, path, dtype)
    if init:
        load_hf(path, chunks, groups)
    else:
        for chunk in chunks:
            chunk.initialise(3)
    wrapped = wrap(chunks, groups)
    optimizer = build_optimizer(wrapped, OptimizerSettings(), groups)
    for group in optimizer.param_groups:
        for master in group["params"]:
            master.data += shift
    Checkpoints(folder, CheckpointSettings(), groups).save(5, chunks, optimizer, {})


@pytest.mark.parametrize("layout", [(1, {}), (2, {"tp": 2}), (4, {"tp": 2, "pp": 2}), (2, {"pp": 2, "vpp": 2})])
@pytest.mark.parametrize("family", ["granite-4.0-h-micro", "nemotron-h"])
def test_a_run_of_any_layout_is_exported(convert, tmp_path, family, layout):
    save_hf(family, tmp_path / "in", dtype=torch.bfloat16, max_shard_size="60KB")
    world_size, degrees = layout
    run = tmp_path / "run"
    remember(str(tmp_path / "in"), None, run)
    run_ranks(world_size, train_and_save, tmp_path / "in", run / "checkpoints", torch.bfloat16, True, **degrees)
    assert convert("to-hf", run, tmp_path / "out", "--verify") == 0
    assert_same_files(tmp_path / "in", tmp_path / "out")


def remember(init, spec, run):
    from prism_mcore.convert.offline import remember_source

    remember_source(init, spec, run / "source")


def test_what_is_rounded_is_said(convert, capsys, tmp_path):
    """A run in fp32 of a bf16 directory: what it learned below bf16 is lost, unless fp32 is asked for."""
    save_hf("llama-3.1", tmp_path / "in", dtype=torch.bfloat16)
    run = tmp_path / "run"
    remember(str(tmp_path / "in"), None, run)
    for dtype, step in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        run_ranks(1, train_and_save, tmp_path / "in", run / "checkpoints", dtype, True)
        assert convert("to-hf", run, tmp_path / step) == 0
        said = capsys.readouterr().err
        assert ("more tensors are rounded" in said and "--master" in said) == (step == "fp32")
        assert convert("to-hf", run, tmp_path / f"{step} masters", "--master") == 0
        assert "are rounded" not in capsys.readouterr().err


def test_a_shape_is_known_from_what_was_kept(tmp_path, imported):
    """model.init without model.spec: an import, its step, a run that started from it, and that run's checkpoint."""
    from prism_mcore.config import SettingsError
    from prism_mcore.model.settings import ModelSettings, resolve_spec

    run = tmp_path / "run"
    remember(str(imported / "ckpt"), None, run)
    shutil.copytree(imported / "ckpt" / "step_00000000", run / "checkpoints" / "step_00000000")
    (run / "checkpoints" / "latest").write_text("step_00000000")
    spec = read_spec(imported / "in")
    for kept in (imported / "ckpt", imported / "ckpt" / "step_00000000", run, run / "checkpoints"):
        assert resolve_spec(ModelSettings(init=str(kept))) == spec
    assert resolve_spec(ModelSettings(init=str(run / "checkpoints" / "step_00000000"))) == spec
    shutil.rmtree(run / "source")
    with pytest.raises(SettingsError, match=r"model.init=.*run has no config.json.*set model.spec"):
        resolve_spec(ModelSettings(init=str(run)))


def test_masters_are_exported_in_fp32(convert, tmp_path):
    save_hf("granite-4.0-h-micro", tmp_path / "in", dtype=torch.bfloat16, max_shard_size="60KB")
    run = tmp_path / "run"
    remember(str(tmp_path / "in"), None, run)
    run_ranks(4, train_and_save, tmp_path / "in", run / "checkpoints", torch.bfloat16, True, 1e-6, tp=2, pp=2)
    assert convert("to-hf", run, tmp_path / "out", "--master", "--verify") == 0
    for shard_file in sorted((tmp_path / "in").glob("*.safetensors")):
        weights, masters = load_file(shard_file), load_file(tmp_path / "out" / shard_file.name)
        assert list(weights) == list(masters)
        for name, weight in weights.items():
            assert masters[name].dtype == torch.float32
            assert torch.equal(masters[name], weight.float() + 1e-6), name
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    source = json.loads((tmp_path / "in" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * source["metadata"]["total_size"]
    assert index["weight_map"] == source["weight_map"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_from_random_weights_is_exported_as_transformers_would(convert, tmp_path, family, dtype):
    """The names, file and order of `save_pretrained`; transformers reads every weight, and finds nothing else."""
    import transformers

    save_hf(family, tmp_path / "theirs", dtype=dtype)
    run = tmp_path / "run"
    remember("random", str(tmp_path / "theirs" / "config.json"), run)
    run_ranks(2, train_and_save, tmp_path / "theirs", run / "checkpoints", dtype, False, tp=2)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    assert convert("to-hf", run, tmp_path / "out", "--tokenizer", tokenizer) == 0
    out = files(tmp_path / "out")
    assert out.keys() == {"config.json", "tokenizer.json", "model.safetensors"}
    assert out["config.json"] == (tmp_path / "theirs" / "config.json").read_bytes()
    weights, theirs = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(tmp_path / "theirs" / "model.safetensors"),
    )
    assert {n: t.shape for n, t in weights.items()} == {n: t.shape for n, t in theirs.items()}
    assert {t.dtype for t in weights.values()} <= {dtype, torch.float32}
    if {t.dtype for t in weights.values()} == {dtype}:  # no A_log that a run keeps in fp32
        (ours,), (reference,) = (read_directory(tmp_path / n).shards.values() for n in ("out", "theirs"))
        assert ours.header == reference.header
    _, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report


# --- what is wrong is said, and nothing is left behind ----------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    from prism_mcore.convert.offline import import_hf, plan_import

    folder = tmp_path_factory.mktemp("imported")
    save_hf("llama-3.1", folder / "in", dtype=torch.bfloat16, max_shard_size="30KB")
    import_hf(plan_import(folder / "in"), folder / "ckpt")
    return folder


def refused(convert, capsys, tmp_path, *arguments):
    """One line, exit code 1, and nothing at the target; returns the line."""
    before = sorted(path.name for path in tmp_path.iterdir())
    assert convert(*arguments) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("convert_checkpoint:")]
    return line


def test_a_broken_directory(convert, capsys, tmp_path, imported):
    shutil.copytree(imported / "in", tmp_path / "in")
    file = tmp_path / "in" / "model-00002-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert f"{file} has" in refused(convert, capsys, tmp_path, "from-hf", tmp_path / "in", tmp_path / "out")


def test_a_tied_output_layer_that_differs(convert, capsys, tmp_path):
    from safetensors.torch import save_file

    save_hf("granite-3.3", tmp_path / "in", dtype=torch.bfloat16)
    file = tmp_path / "in" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 2
    save_file(weights, file)
    line = refused(convert, capsys, tmp_path, "from-hf", tmp_path / "in", tmp_path / "out")
    assert f"{file}: lm_head.weight differs from model.embed_tokens.weight" in line


def test_a_damaged_checkpoint(convert, capsys, tmp_path, imported):
    shutil.copytree(imported / "ckpt", tmp_path / "ckpt")
    file = tmp_path / "ckpt" / "step_00000000" / "__0_0.safetensors"
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    line = refused(convert, capsys, tmp_path, "to-hf", tmp_path / "ckpt", tmp_path / "out")
    assert f"{file} is damaged" in line


def test_an_index_that_is_not_one(convert, capsys, tmp_path, imported):
    """The manifest agrees, and still no class is unpickled but the index's own, of a checkpoint of version 1."""
    from tiny.version_1 import make_version_1

    from prism_mcore.checkpoint.durable import write_manifest

    shutil.copytree(imported / "ckpt", tmp_path / "ckpt")
    step = tmp_path / "ckpt" / "step_00000000"
    make_version_1(step)
    (step / ".metadata").write_bytes(pickle.dumps(subprocess.Popen))
    write_manifest(step, {})
    line = refused(convert, capsys, tmp_path, "to-hf", tmp_path / "ckpt", tmp_path / "out")
    assert "subprocess.Popen" in line


def test_a_checkpoint_of_another_model(convert, capsys, tmp_path, imported):
    shutil.copytree(imported / "ckpt", tmp_path / "ckpt")
    save_hf("llama-3.1", tmp_path / "other", dtype=torch.bfloat16, intermediate_size=96)
    shutil.rmtree(tmp_path / "ckpt" / "source")
    remember(str(tmp_path / "other"), None, tmp_path / "ckpt")
    line = refused(convert, capsys, tmp_path, "to-hf", tmp_path / "ckpt", tmp_path / "out")
    assert "layers.1.mixer.gate_up.weight.gate has the shape [80, 48]; the config.json needs [96, 48]" in line


def test_masters_of_an_import(convert, capsys, tmp_path, imported):
    line = refused(convert, capsys, tmp_path, "to-hf", imported / "ckpt", tmp_path / "out", "--master")
    assert "it holds no fp32 masters" in line


@pytest.mark.parametrize("block_bytes", [4096, 2**23])  # noticed in the middle of a tensor, and when the file is closed
@pytest.mark.parametrize("command", ["from-hf", "to-hf"])
def test_a_full_disk(convert, capsys, tmp_path, monkeypatch, imported, command, block_bytes):
    """RLIMIT_FSIZE stands in for it: the write fails in the same place, with EFBIG instead of ENOSPC."""
    monkeypatch.setattr("prism_mcore.checkpoint.files.BLOCK_BYTES", block_bytes)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        source = imported / ("in" if command == "from-hf" else "ckpt")
        line = refused(convert, capsys, tmp_path, command, source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert f"cannot write {tmp_path / 'out'}" in line
    assert "File too large" in line


@pytest.mark.parametrize("command", ["from-hf", "to-hf"])
def test_nothing_is_overwritten_and_a_dry_run_writes_nothing(convert, capsys, tmp_path, imported, command):
    source = imported / ("in" if command == "from-hf" else "ckpt")
    assert convert(command, source, tmp_path / "out", "--dry-run") == 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    assert "exists already" in refused(convert, capsys, tmp_path, command, source, tmp_path / "out")


def test_a_killed_process_leaves_no_directory_that_looks_whole(tmp_path, imported):
    """Killed while it writes: at the name of the target there is nothing, and the next try succeeds."""
    code = (
        "import os, sys; from prism_mcore.convert import write;"
        "write.write_export_manifest = lambda *rest: os._exit(9);"
        f"sys.argv = [{str(TOOL)!r}, 'to-hf', {str(imported / 'ckpt')!r}, {str(tmp_path / 'out')!r}];"
        "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 9
    assert [path.name for path in tmp_path.iterdir()] == [".tmp_out"]
    subprocess.run(
        [sys.executable, TOOL, "to-hf", imported / "ckpt", tmp_path / "out"], check=True, capture_output=True
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
