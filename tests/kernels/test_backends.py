"""The table of backends, and the records of boundaries."""

from inspect import signature

import pytest
import torch
from tiny.accuracy import documents

from prism_kernels import reference
from prism_kernels.backends import IMPLEMENTATIONS, function, select
from prism_kernels.boundaries import Boundaries


def test_every_op_has_a_backend_and_a_reason():
    chosen = select({"ssd_scan": "reference", "rope": "auto"}, "cpu")
    assert set(chosen) == set(IMPLEMENTATIONS)
    assert chosen["ssd_scan"].reason == "asked for by kernels.ssd_scan"
    assert {choice.backend for choice in chosen.values()} == {"reference", "megatron", "torch"}


def test_transformer_engine_is_taken_on_a_gpu_where_it_is_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: package)
    on_gpu, on_cpu = select({}, "cuda"), select({}, "cpu")
    from_te = {op for op, choice in on_gpu.items() if choice.backend == "te"}
    assert from_te == {"linear", "rms_norm", "attention", "adamw"}
    assert not [op for op, choice in on_cpu.items() if choice.backend == "te"]
    assert select({"attention": "reference"}, "cuda")["attention"].backend == "reference"


def test_other_libraries_kernels_are_second_to_ours_on_a_gpu_and_attention_of_flash_attn_is_first(monkeypatch):
    absent = {"transformer_engine", "apex"}
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None if package in absent else package)
    chosen = {op: choice.backend for op, choice in select({}, "cuda").items()}
    assert chosen["attention"] == "flash_attn" and chosen["linear"] == "megatron"
    assert {chosen[op] for op in ("ssd_scan", "causal_conv1d", "adamw", "rms_norm", "linear_cross_entropy")} == {
        "triton"
    }
    asked = {"ssd_scan": "mamba_ssm", "causal_conv1d": "causal_conv1d", "adamw": "torch"}
    assert {op: select(asked, "cuda")[op].backend for op in asked} == asked
    with pytest.raises(ValueError, match=r"kernels.adamw=apex: .*apex is not installed: see github.com"):
        select({"adamw": "apex"}, "cuda")


def test_every_function_in_the_table_exists_and_takes_what_its_reference_takes():
    """kernels of packages that are not here are imported when they are called"""
    for op, table in IMPLEMENTATIONS.items():
        reference = signature(function(op, "reference")) if "reference" in table else None
        for backend, place in table.items():
            if place and backend != "exact":
                assert signature(function(op, backend)) == reference, f"{op} by {backend}"


def test_what_other_libraries_do_not_cover_goes_to_the_reference(caplog):
    boundaries, q = documents(5, 3), torch.randn(8, 2, 8)
    attention = function("attention", "flash_attn")  # fp32
    assert torch.equal(attention(q, q, q, boundaries, 0.3), reference.attention(q, q, q, boundaries, 0.3))
    x, weight = torch.randn(8, 16), torch.randn(16, 4)
    convolve = function("causal_conv1d", "causal_conv1d")
    expected = reference.causal_conv1d(x, weight, None, boundaries, return_final_state=True)
    for a, b in zip(convolve(x, weight, None, boundaries, return_final_state=True), expected, strict=True):
        assert torch.equal(a, b)
    inputs = (q, torch.randn(8, 2), torch.randn(2), q, q, None, torch.randn(2), boundaries)
    scan = function("ssd_scan", "mamba_ssm")
    assert torch.equal(scan(*inputs, 24), reference.ssd_scan(*inputs, 24))
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "attention: flash-attn has no torch.float32: needs bf16 or fp16",
        "causal_conv1d: causal-conv1d takes no states together with packed documents",
        "ssd_scan: chunk_len 24: mamba-ssm needs a power of two, at least 16",
    ]


def test_only_what_is_shown_to_be_is_called_independent_of_the_batch():
    exact = {op: "exact" for op, table in IMPLEMENTATIONS.items() if "exact" in table}
    assert all(choice.batch_invariant for op, choice in select(exact, "cpu").items() if op in exact)
    chosen = select({"swiglu": "triton", "linear_cross_entropy": "triton"}, "cpu")
    assert chosen["swiglu"].batch_invariant and not chosen["linear_cross_entropy"].batch_invariant
    assert not chosen["linear"].batch_invariant and not chosen["attention"].batch_invariant


def test_lengths_known_on_the_cpu_are_not_asked_of_the_device():
    lengths = torch.tensor([0, 3, 8], dtype=torch.int32)
    boundaries = Boundaries.on(torch.device("meta"), lengths)
    assert boundaries.cu_seqlens.is_meta and boundaries.documents == [(0, 0, 3), (1, 3, 8)]
    assert boundaries.chunks(2).slot.is_meta and boundaries.history_slots(3)[0].is_meta


def test_a_backend_that_is_not_there_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"kernels.rope=flash_attn: .*this version has no flash_attn"):
        select({"rope": "flash_attn"}, "cpu")
    with pytest.raises(ValueError, match=r"kernels.attention=flash_attn: .*pip install flash-attn|needs a GPU"):
        select({"attention": "flash_attn"}, "cpu")
    with pytest.raises(ValueError, match=r"kernels.attn: no such op; ops are linear, rms_norm"):
        select({"attn": "reference"}, "cpu")


@pytest.mark.parametrize("lengths", [[8, 8], [7, 7], [5, 0, 9, 1]])
def test_a_chunk_grid_restarts_at_each_document_and_loses_nothing(lengths):
    boundaries = documents(*lengths)
    grid = boundaries.chunks(4)
    tokens = torch.arange(1, boundaries.num_tokens + 1)[:, None]
    filled = grid.fill(tokens)
    assert torch.equal(grid.flatten(filled), tokens)
    document = torch.bucketize(tokens[:, 0] - 1, boundaries.cu_seqlens[1:], right=True)
    for chunk in filled[..., 0]:
        assert len(document[chunk[chunk > 0] - 1].unique()) == 1
    assert torch.equal(filled[grid.first, 0, 0] - 1, torch.tensor([start for _, start, _ in boundaries.documents]))
    assert grid.num_chunks == sum(-(-n // 4) for n in lengths)
    assert boundaries.chunks(4) is grid


def test_equal_documents_that_fill_their_chunks_are_not_copied():
    x = torch.randn(16, 3)
    assert documents(8, 8).chunks(4).fill(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("bad", [[1, 4], [0, 5, 3], [0], [[0, 4]], [0, 0]])
def test_bad_boundaries_are_refused(bad):
    with pytest.raises(ValueError, match="non-decreasing list from 0"):
        _ = Boundaries(torch.tensor(bad, dtype=torch.int32)).num_tokens
