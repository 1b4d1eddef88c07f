"""The automatic pipeline cut is the best there is, and the FLOPs it weighs are right."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from tiny.models import packed_batch

from prism_mcore.model.flops import flops_of_documents, flops_per_token, head_flops, mean_keys, sublayer_flops
from prism_mcore.model.spec import read_spec
from prism_mcore.model.split import split_layers
from prism_mcore.plan.throughput import peak_flops


def slowest(spec, split):
    costs = [sum(sublayer_flops(spec, spec.pattern[i], 512) for i in chunk) for chunk in split]
    return max([*costs[:-1], costs[-1] + head_flops(spec)])


@pytest.mark.parametrize(("name", "pp", "vpp"), [("demo-hybrid", 2, 2), ("demo-dense", 3, 1), ("demo-hybrid", 5, 1)])
def test_no_other_cut_has_a_faster_slowest_chunk(name, pp, vpp):
    spec = read_spec(name)
    layers = len(spec.pattern)
    every = [
        [list(range(a, b)) for a, b in zip((0, *cuts), (*cuts, layers), strict=True)]
        for cuts in combinations(range(1, layers), pp * vpp - 1)
    ]
    assert slowest(spec, split_layers(spec, pp, vpp, 512)) == pytest.approx(min(slowest(spec, cut) for cut in every))


def test_the_head_takes_the_place_of_sub_layers():
    spec = read_spec("mistral-small-24b-2501")
    assert [len(chunk) for chunk in split_layers(replace(spec, vocab_size=1), 4, 1, 8192)] == [20, 20, 20, 20]
    assert len(split_layers(replace(spec, vocab_size=10**6), 4, 1, 8192)[-1]) < 10


def test_a_given_cut_is_kept_in_model_order_and_checked():
    spec = read_spec("demo-hybrid")
    assert split_layers(spec, 2, 2, 512, [1, 2, 2, 3]) == [[0], [1, 2], [3, 4], [5, 6, 7]]
    for wrong in ([4, 5], [8], [8, 0]):
        with pytest.raises(ValueError, match="sum to 8"):
            split_layers(spec, 2, 1, 512, wrong)
    with pytest.raises(ValueError, match="at most 8"):
        split_layers(spec, 9, 1, 512)


def test_flops_of_llama_are_megatron_bridges():
    # 51.5 GFLOP per token at 8,192, its count since 25.09 (causal attention)
    assert flops_per_token(read_spec("llama-3.1-8b"), 8192) == pytest.approx(51.5e9, rel=1e-3)


def test_recompute_adds_one_forward_of_what_it_names():
    spec = read_spec("demo-hybrid")
    extra = flops_per_token(spec, 512, ["mlp"]) - flops_per_token(spec, 512)
    assert extra == pytest.approx(4 * 4 * 128 * 384)


def test_isolated_documents_cost_the_squares_of_their_lengths():
    spec = read_spec("demo-dense")
    width, lengths = spec.num_heads * spec.head_dim, np.array([100, 400, 12])
    fewer = flops_of_documents(spec, np.array([512])) - flops_of_documents(spec, lengths)
    pairs = 512 * 513 // 2 - sum(n * (n + 1) // 2 for n in lengths.tolist())
    assert fewer == pytest.approx(3 * 4 * width * pairs * spec.pattern.count("*"))


def test_a_batch_says_how_long_its_documents_are():
    batch = packed_batch([torch.arange(n) for n in (3, 13, 16)], 16)
    assert batch.document_lengths.tolist() == [3, 13, 16]


def test_mean_keys_counts_them():
    for seq_len, window in [(1, None), (7, None), (7, 3), (7, 7), (3, 8)]:
        seen = [min(i + 1, window or seq_len) for i in range(seq_len)]
        assert mean_keys(seq_len, window) == pytest.approx(sum(seen) / seq_len)


def test_the_longer_device_name_wins():
    assert (peak_flops("NVIDIA H100 PCIe"), peak_flops("NVIDIA H100 80GB HBM3")) == (756e12, 989e12)
    assert peak_flops("Some CPU") is None
