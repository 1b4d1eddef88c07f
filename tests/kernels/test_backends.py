"""The table of backends, and the records of boundaries."""

import pytest
import torch
from accuracy import documents

from prism_kernels.backends import IMPLEMENTATIONS, select
from prism_kernels.boundaries import Boundaries


def test_every_op_has_a_backend_and_a_reason():
    chosen = select({"ssd_scan": "reference", "rope": "auto"}, "cpu")
    assert set(chosen) == set(IMPLEMENTATIONS)
    assert chosen["ssd_scan"].reason == "asked for by kernels.ssd_scan"
    assert {choice.backend for choice in chosen.values()} == {"reference", "megatron"}


def test_transformer_engine_is_taken_on_a_gpu_where_it_is_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: package)
    on_gpu, on_cpu = select({}, "cuda"), select({}, "cpu")
    assert {op for op, choice in on_gpu.items() if choice.backend == "te"} == {"linear", "rms_norm", "attention"}
    assert not [op for op, choice in on_cpu.items() if choice.backend == "te"]
    assert select({"attention": "reference"}, "cuda")["attention"].backend == "reference"


def test_a_backend_that_is_not_there_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"kernels.attention=flash_attn: .*this version has no flash_attn"):
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
