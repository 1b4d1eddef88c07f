"""Verification a layer at a time: every family agrees with transformers, and no more than a layer is in memory."""

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny.hf_models import FAMILIES, SEQ_LEN, save_hf

from prism_mcore.convert import reference
from prism_mcore.convert.names import ExchangeError
from prism_mcore.convert.read import read_directory
from prism_mcore.convert.sublayers import Sublayers
from prism_mcore.evaluate.scoring import one_document_each

TOKENS = torch.randint(61, (2, SEQ_LEN), generator=torch.Generator().manual_seed(1))


def differences(groups, hf, folder, theirs):
    """Of every output, and the most parameters that transformers' model had at once; the head in 4 pieces."""
    reference.VOCABULARY_ROWS = 16
    held, fill = [], reference._Weights.fill

    def filled(weights, module, inputs):
        fill(weights, module, inputs)
        own = (p for m in weights.modules for p in m.parameters(recurse=False))
        held.append(sum(p.numel() for p in own if p.device.type != "meta"))

    reference._Weights.fill = filled
    folder.mkdir()
    reference.write_reference(theirs, TOKENS, folder)
    source = read_directory(hf)
    ours = Sublayers(source, groups, one_document_each(TOKENS), folder, kernels={}, sequence_parallel=False)
    return ours.compare(list(range(len(source.spec().pattern)))), max(held)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_with_one_decoder_layer_in_memory(family, tmp_path):
    save_hf(family, tmp_path / "hf")
    ((found, held),) = run_ranks(1, differences, tmp_path / "hf", tmp_path / "reference", tmp_path / "hf")
    spec = read_directory(tmp_path / "hf").spec()
    assert [d.output for d in found] == reference.output_names(spec)
    assert max(max(d.alone, d.chained) for d in found) <= 1e-5
    sizes = [0] * len(spec.pattern)
    for tensors in map(load_file, (tmp_path / "hf").glob("*.safetensors")):
        for name, tensor in tensors.items():
            if ".layers." in name:
                each = len(reference.decoder_layers(spec)[0])
                sizes[int(name.split(".layers.")[1].split(".")[0]) * each] += tensor.numel()
    assert held == max(sizes)


def test_what_differs_is_told_apart_from_what_follows_from_it(tmp_path):
    """An MLP of ours has another weight: its own output differs, those after it only in the chain."""
    save_hf("llama-3.1", tmp_path / "theirs")
    save_hf("llama-3.1", tmp_path / "ours")
    (file,) = (tmp_path / "ours").glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 0.01
    save_file(tensors, file, {"format": "pt"})
    ((found, _),) = run_ranks(1, differences, tmp_path / "ours", tmp_path / "reference", tmp_path / "theirs")
    assert [d.output for d in found if d.alone > 1e-5] == ["sub-layer 1 mlp"]
    assert [d.output for d in found if d.chained > 1e-5] == reference.output_names(read_directory(file.parent).spec())[
        2:
    ]


def test_a_tensor_that_transformers_needs_and_no_file_has_is_named(tmp_path):
    save_hf("llama-3.1", tmp_path / "hf")
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ExchangeError, match=r"has no model\.layers\.1\.self_attn\.q_proj\.weight"):
        reference.write_reference(tmp_path / "hf", TOKENS, tmp_path)
