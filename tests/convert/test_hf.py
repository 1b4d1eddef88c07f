"""Weights of a Hugging Face directory in a running model, and back."""

import pytest
import torch
import torch.distributed as dist
from models import CONFIGS, SPECS
from oracle import hf_model, our_weights
from ranks import run_ranks

from prism_mcore.model.build import build_chunks
from prism_mcore.model.ops import Ops
from prism_mcore.model.parameters import gather
from prism_mcore.plan.split import split_layers

LAYOUTS = {
    "1": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "pp2 x vpp2": (2, {"pp": 2, "vpp": 2}),
    "tp2 x dp2": (4, {"tp": 2}),
    "tp2 x pp2": (4, {"tp": 2, "pp": 2}),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A directory as transformers writes it, and its weights under our names, for each test config."""
    folder = tmp_path_factory.mktemp("hf")
    found = {}
    for name, config in CONFIGS.items():
        model = hf_model(config).to(torch.bfloat16)
        model.save_pretrained(folder / name, max_shard_size="60KB")
        found[name] = folder / name, our_weights(model, SPECS[name])
    return found


def chunks_for(groups, spec, dtype=torch.bfloat16):
    return build_chunks(
        spec,
        split_layers(spec, groups.pp_size, groups.vpp, seq_len=16),
        groups,
        Ops({}, torch.device("cpu")),
        dtype=dtype,
        device=torch.device("cpu"),
    )


def whole_weights(chunks, groups):
    mine = {}
    for chunk in chunks:
        for name, tensor, parameter in chunk.table():
            shards = [torch.empty_like(tensor) for _ in range(groups.tp_size)]
            dist.all_gather(shards, tensor.detach(), group=groups.tp)
            mine.setdefault(name, []).append((gather(shards, parameter), shards, parameter))
    return mine


def load(groups, path, spec_name):
    from prism_mcore.convert.hf import load_hf

    chunks = chunks_for(groups, SPECS[spec_name])
    for chunk in chunks:
        for tensor in chunk.parameters():
            tensor.data.fill_(7.0)  # what nobody writes shows
    load_hf(path, chunks, groups)
    mine = whole_weights(chunks, groups)
    padding = [shards[-1][-1] for _, shards, p in mine.get("embedding.weight", [])[:1] if p.vocabulary]
    found = [{name: copies[0][0] for name, copies in mine.items()}] * groups.pp_size
    dist.all_gather_object(found, found[0], group=groups.pp)
    return {name: tensor for stage in found for name, tensor in stage.items()}, padding


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_layout_reads_the_same_weights(directories, name, layout):
    path, want = directories[name]
    world_size, degrees = LAYOUTS[layout]
    for weights, padding in run_ranks(world_size, load, path, name, **degrees):
        assert weights.keys() == want.keys()
        wrong = [n for n in want if not torch.equal(weights[n], want[n].to(weights[n].dtype))]
        assert not wrong, wrong
        assert degrees.get("tp", 1) == 1 or all(row.eq(0).all() for row in padding)


# --- there and back ---------------------------------------------------------------------------------------------------


def load_and_save(groups, path, out, spec_name, dtype):
    from prism_mcore.convert.hf import load_hf, save_hf
    from prism_mcore.convert.source import read_source

    chunks = chunks_for(groups, SPECS[spec_name], dtype)
    load_hf(path, chunks, groups)
    save_hf(chunks, groups, out, read_source(path))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_running_model_gives_back_the_same_files(directories, tmp_path, name, layout):
    path, _ = directories[name]
    world_size, degrees = LAYOUTS[layout]
    run_ranks(world_size, load_and_save, path, tmp_path / "out", name, torch.bfloat16, **degrees)
    assert_same_files(path, tmp_path / "out")


def assert_same_files(path, out):
    names = {file.name for file in path.iterdir()}
    assert {file.name for file in out.iterdir()} == names | {"manifest.json"}
    assert [name for name in sorted(names) if (path / name).read_bytes() != (out / name).read_bytes()] == []
