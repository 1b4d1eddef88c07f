"""FLOPs are counted as published, and over what is computed."""

import numpy as np
import pytest
import torch
from tiny.models import packed_batch

from prism_mcore.model.flops import flops_of_documents, flops_per_token, mean_keys
from prism_mcore.model.spec import read_spec


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
