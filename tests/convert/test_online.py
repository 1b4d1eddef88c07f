"""Weights of a Hugging Face directory in a running model, and back to the byte."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks
from safetensors.torch import load_file, save_file
from tiny.hf_models import FAMILIES, save_hf
from tiny.oracle import our_weights

from prism_mcore.convert.names import ExchangeError
from prism_mcore.convert.read import keep_directory, kept_directory, read_directory
from prism_mcore.model.build import build_chunks
from prism_mcore.model.ops import Ops
from prism_mcore.model.spec import read_spec
from prism_mcore.model.split import split_layers
from prism_mcore.model.tensors import gather

LAYOUTS = {
    "1": (1, {}),
    "tp2": (2, {"tp": 2}),
    "cp2": (2, {"cp": 2}),
    "pp2": (2, {"pp": 2}),
    "pp2 x vpp2": (2, {"pp": 2, "vpp": 2}),
    "tp2 x dp2": (4, {"tp": 2}),
    "tp2 x pp2": (4, {"tp": 2, "pp": 2}),
}
# Every family in the simplest and the hardest layout, one of each architecture in all.
CASES = [(family, layout) for family in FAMILIES for layout in ("1", "tp2 x pp2")] + [
    (family, layout)
    for family in ("llama-3.1", "granite-4.0-h-micro", "nemotron-h")
    for layout in ("tp2", "pp2", "pp2 x vpp2", "tp2 x dp2")
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A bf16 directory in several shards, with a tokenizer, and its weights under our names; made when wanted."""
    folder, made = tmp_path_factory.mktemp("hf"), {}

    def directory(family):
        if family not in made:
            path = folder / family
            model = save_hf(family, path, dtype=torch.bfloat16, max_shard_size="40KB", **layers(family))
            (path / "tokenizer.json").write_bytes(b'{"odd": "bytes \xc3\xa9"}\r\n')
            made[family] = path, our_weights(model, read_spec(path))
        return made[family]

    return directory


def layers(family):
    """Enough of them for four pipeline chunks."""
    return {} if "layer_types" in FAMILIES[family] else {"num_hidden_layers": 4}


def chunks_for(groups, spec, dtype=torch.bfloat16):
    split = split_layers(spec, groups.pp_size, groups.vpp, seq_len=16)
    cpu = torch.device("cpu")
    return build_chunks(spec, split, groups, Ops({}, cpu), dtype=dtype, device=cpu)


def round_trip(groups, path, out):
    """Load, save, and the whole weights by name."""
    from prism_mcore.convert import write
    from prism_mcore.convert.online import load_hf, save_hf
    from prism_mcore.convert.read import read_directory

    write.BLOCK_BYTES = 5000  # real tensors are of many blocks
    chunks = chunks_for(groups, read_spec(path))
    for chunk in chunks:
        for tensor in chunk.parameters():
            tensor.data.fill_(7.0)  # what nobody writes shows
    load_hf(path, chunks, groups)
    save_hf(chunks, groups, out, read_directory(path))
    return whole_weights(chunks, groups)


def whole_weights(chunks, groups):
    mine = {}
    for chunk in chunks:
        for name, tensor, parameter in chunk.table():
            shards = [torch.empty_like(tensor) for _ in range(groups.tp_size)]
            dist.all_gather(shards, tensor.detach(), group=groups.tp)
            if parameter.vocabulary and groups.tp_size == 2:
                assert shards[-1][-1].eq(0).all(), f"the padding of {name} is not zeros"
            mine[name] = gather(shards, parameter)
    stages = [None] * groups.pp_size
    dist.all_gather_object(stages, mine, group=groups.pp)
    for stage in stages[1:]:  # the last stage's copy of a tied embedding
        assert torch.equal(stage.get("embedding.weight", stages[0]["embedding.weight"]), stages[0]["embedding.weight"])
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def assert_same_files(path, out):
    names = {file.name for file in path.iterdir()}
    assert {file.name for file in out.iterdir()} == names | {"manifest.json"}
    assert [name for name in sorted(names) if (path / name).read_bytes() != (out / name).read_bytes()] == []


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_every_layout_reads_the_same_weights_and_writes_the_same_files(directories, tmp_path, family, layout):
    path, want = directories(family)
    world_size, degrees = LAYOUTS[layout]
    for weights in run_ranks(world_size, round_trip, path, tmp_path / "out", **degrees):
        assert weights.keys() == want.keys()
        assert [n for n in want if not torch.equal(weights[n], want[n].to(weights[n].dtype))] == []
    assert_same_files(path, tmp_path / "out")


def load_save(groups, path, out, dtype, source):
    from prism_mcore.convert.online import load_hf, save_hf
    from prism_mcore.convert.read import kept_directory

    chunks = chunks_for(groups, read_spec(path), dtype)
    load_hf(path, chunks, groups)
    save_hf(chunks, groups, out, kept_directory(source))


def test_the_kept_layout_replaces_the_directory(directories, tmp_path):
    """What stays beside a run is enough for the same files, and is small; fp32 parameters come back as bf16."""
    path, _ = directories("nemotron-h")
    keep_directory(read_directory(path), tmp_path / "source")
    assert not list((tmp_path / "source").glob("*.safetensors"))
    run_ranks(2, load_save, path, tmp_path / "out", torch.float32, tmp_path / "source", pp=2)
    assert_same_files(path, tmp_path / "out")


@pytest.mark.parametrize("duplicate", [False, True])
def test_a_tied_output_layer_comes_back_where_it_was(tmp_path, duplicate):
    save_hf("granite-3.3", tmp_path / "in", dtype=torch.float16)
    if duplicate:
        rewrite(tmp_path / "in", lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    run_ranks(2, load_save_fp32, tmp_path / "in", tmp_path / "out", tp=2)
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == duplicate
    assert_same_files(tmp_path / "in", tmp_path / "out")


def load_save_fp32(groups, path, out):
    from prism_mcore.convert.online import load_hf, save_hf
    from prism_mcore.convert.read import read_directory

    chunks = chunks_for(groups, read_spec(path), torch.float32)  # holds every fp16 number
    load_hf(path, chunks, groups)
    save_hf(chunks, groups, out, read_directory(path))


# --- what is wrong with a directory is said before anything is read ---------------------------------------------------


def rewrite(path, change):
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def put_in_index(path, name, file):
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = file
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def forget_in_index(path, name):
    index = json.loads((path / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


Q = "model.layers.0.self_attn.q_proj.weight"
SINGLE = {
    "wrong shape": (
        lambda p: rewrite(p, lambda w: w | {Q: w[Q][1:].clone()}),
        [r"model\.safetensors", Q, r"\[63, 48\]", r"\[64, 48\]"],
    ),
    "lacks a tensor": (lambda p: rewrite(p, lambda w: {n: t for n, t in w.items() if n != Q}), [f"has no {Q}"]),
    "has one too many": (
        lambda p: rewrite(p, lambda w: w | {"model.layers.9.x": torch.zeros(3)}),
        [r"model\.safetensors", r"model\.layers\.9\.x", "nothing would read"],
    ),
    "integers": (
        lambda p: rewrite(p, lambda w: w | {Q: w[Q].to(torch.int8)}),
        [r"model\.safetensors", Q, "I8"],
    ),
    "truncated": (
        lambda p: cut(p / "model.safetensors", 60_000),
        [r"model\.safetensors has 60000 bytes", "truncated", "cut off"],
    ),
    "truncated header": (lambda p: cut(p / "model.safetensors", 50), [r"model\.safetensors", "truncated"]),
    "not safetensors": (
        lambda p: (p / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"no json!" + b"x" * 9),
        [r"model\.safetensors is not a safetensors file"],
    ),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), ["neither model.safetensors nor"]),
    "a pickle": (
        lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"),
        [r"pytorch_model\.bin is a pickle", "save_pretrained"],
    ),
    "unknown architecture": (
        lambda p: edit_json(p / "config.json", architectures=["GPT2LMHeadModel"], model_type="gpt2"),
        [r"config\.json", "GPT2LMHeadModel"],
    ),
    "no config": (lambda p: (p / "config.json").unlink(), [r"config\.json"]),
}
SHARDED = {
    "missing shard": (
        lambda p: (p / "model-00002-of-00004.safetensors").unlink(),
        [r"index\.json names model-00002-of-00004\.safetensors", "missing"],
    ),
    "index names a file that is not there": (
        lambda p: put_in_index(p, Q, "model-00009-of-00004.safetensors"),
        [r"index\.json names model-00009-of-00004\.safetensors", "missing"],
    ),
    "index names a file elsewhere": (lambda p: put_in_index(p, Q, "../other.safetensors"), [r"\.\./other", Q]),
    "index names the wrong file": (
        lambda p: put_in_index(p, Q, "model-00004-of-00004.safetensors"),
        [r"index\.json", r"model-0000[14]-of-00004\.safetensors has", Q],
    ),
    "index does not name a tensor": (
        lambda p: forget_in_index(p, Q),
        [r"model-00001-of-00004\.safetensors has", Q, "says nothing"],
    ),
    "index names a tensor that is not there": (
        lambda p: put_in_index(p, "model.layers.0.x", "model-00001-of-00004.safetensors"),
        [r"index\.json", r"model\.layers\.0\.x", "it has not"],
    ),
    "truncated shard": (
        lambda p: cut(p / "model-00003-of-00004.safetensors", 20_000),
        [r"model-00003-of-00004\.safetensors has 20000 bytes", "truncated"],
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save_hf("llama-3.1", folder / "single", dtype=torch.bfloat16)
    save_hf("llama-3.1", folder / "sharded", dtype=torch.bfloat16, max_shard_size="30KB")
    for name in ("single", "sharded"):
        source = read_directory(folder / name)
        assert source.tensors(source.spec())
    assert len(read_directory(folder / "sharded").shards) == 4
    return folder


@pytest.mark.parametrize("fault", [*SINGLE, *SHARDED])
def test_one_message_names_the_file_and_the_tensor(good, tmp_path, fault):
    shutil.copytree(good / ("single" if fault in SINGLE else "sharded"), tmp_path / "bad")
    break_it, words = (SINGLE | SHARDED)[fault]
    break_it(tmp_path / "bad")
    with pytest.raises(ExchangeError) as error:
        source = read_directory(tmp_path / "bad")
        source.tensors(source.spec())
    assert "\n" not in str(error.value)
    for word in words:
        assert error.match(word)


def load_other_spec(groups, path, spec_path):
    from prism_mcore.convert.online import load_hf

    load_hf(path, chunks_for(groups, read_spec(spec_path)), groups)


def test_every_rank_is_told(good, tmp_path):
    """Rank 1 alone would meet the broken rows."""
    save_hf("granite-3.3", tmp_path / "tied", dtype=torch.bfloat16)

    def differ(weights):
        head = weights["model.embed_tokens.weight"].clone()
        head[-1, 0] += 1
        return weights | {"lm_head.weight": head}

    rewrite(tmp_path / "tied", differ)
    with pytest.raises(RankError) as error:
        run_ranks(2, load_other_spec, tmp_path / "tied", tmp_path / "tied", tp=2)
    for rank in range(2):
        assert "lm_head.weight differs from model.embed_tokens.weight" in error.value.reports[rank]


def test_another_family_is_refused(good, tmp_path):
    save_hf("granite-3.3", tmp_path / "granite")
    with pytest.raises(RankError, match="is a granite model; the model to fill is llama"):
        run_ranks(1, load_other_spec, tmp_path / "granite", good / "single")


def save_on_full_disk(groups, path, out):
    from prism_mcore.convert.online import load_hf, save_hf
    from prism_mcore.convert.read import read_directory

    chunks = chunks_for(groups, read_spec(path))
    load_hf(path, chunks, groups)
    if groups.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        save_hf(chunks, groups, out, read_directory(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_full_disk_is_told_on_every_rank_and_leaves_nothing(good, tmp_path):
    """RLIMIT_FSIZE stands in for it: the write fails in the same place, with EFBIG instead of ENOSPC."""
    out = tmp_path / "out"
    with pytest.raises(RankError) as error:
        run_ranks(2, save_on_full_disk, good / "sharded", out, tp=2)
    for rank in range(2):
        assert f"cannot write {out}" in error.value.reports[rank]
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(good, tmp_path):
    before = {file: Path(file).read_bytes() for file in good.rglob("*") if file.is_file()}
    with pytest.raises(RankError, match="exists already"):
        run_ranks(1, round_trip, good / "single", good / "sharded")
    assert {file: Path(file).read_bytes() for file in good.rglob("*") if file.is_file()} == before


def test_a_kept_layout_of_another_version_is_refused(good, tmp_path):
    keep_directory(read_directory(good / "single"), tmp_path / "source")
    edit_json(tmp_path / "source" / "layout.json", version=2)
    with pytest.raises(ExchangeError, match=r"layout\.json has version 2"):
        kept_directory(tmp_path / "source")
