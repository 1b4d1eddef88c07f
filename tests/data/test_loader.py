"""Batches: exact fields, the same samples in any layout, resumed by one integer, and errors that name the file."""

import struct
import threading
from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny.token_files import random_lengths, write_tokens

from prism_mcore.batch import PackedBatch
from prism_mcore.data.loader import DataLoader
from prism_mcore.data.settings import DataSettings
from prism_mcore.data.token_file import TokenFile, TokenFileError, TokenFileWriter

VOCAB = 60_000


def settings(*paths: str, **changes) -> DataSettings:
    sources = [{"path": path, "weight": 1 + i, "domain": f"d{i}"} for i, path in enumerate(paths)]
    return DataSettings.model_validate({"sources": sources, "seq_len": 16, "prefetch_steps": 0} | changes)


def loader(data: DataSettings, **changes) -> DataLoader:
    return DataLoader(data, **({"vocab_size": VOCAB, "seed": 3, "global_batch": 8, "micro_batch": 2} | changes))


def take(iterator, count: int) -> list:
    return [next(iterator) for _ in range(count)]


def same(one: PackedBatch, other: PackedBatch) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(PackedBatch)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.fixture
def two_sources(tmp_path) -> tuple[str, str]:
    one = write_tokens(tmp_path / "one", random_lengths(0, 60, 11))
    return one, write_tokens(tmp_path / "two", random_lengths(1, 40, 30), dtype=np.int32, first=10_000, mask=True)


def test_fields_of_isolated_documents_are_those_of_the_batch_docstring(tmp_path):
    with TokenFileWriter(tmp_path / "c", np.uint16) as writer:
        writer.add(np.array([5, 6, 7, 9, 3, 4, 8, 2, 6]), np.array([3, 1, 4, 1]))
    # Two rows, whose order the seed decides: look at row 0 and 1 of the file.
    data = loader(settings(str(tmp_path / "c"), seq_len=4, document_mask=True), global_batch=2)
    batch = next(data.steps())[0]
    first = 0 if batch.tokens[0, 0] == 5 else 1
    assert batch.tokens[[first, 1 - first]].tolist() == [[5, 6, 7, 9], [3, 4, 8, 2]]
    assert batch.labels[[first, 1 - first]].tolist() == [[6, 7, 9, 3], [4, 8, 2, 6]]
    assert batch.loss_mask[[first, 1 - first]].tolist() == [[True, True, False, False], [True, True, True, False]]
    assert batch.position_ids[[first, 1 - first]].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    expected = {0: ([[0, 0, 0, 1], [2, 2, 2, 2]], [0, 3, 4]), 1: ([[0, 0, 0, 0], [1, 1, 1, 2]], [0, 4, 7])}[first]
    assert batch.seq_idx.tolist() == expected[0]
    assert batch.cu_seqlens.tolist() == expected[1] + [8] * 6
    assert (batch.max_seqlen, batch.num_tokens) == (4, 5)
    dtypes = (batch.tokens, batch.labels, batch.loss_mask, batch.position_ids, batch.seq_idx, batch.cu_seqlens)
    assert [tensor.dtype for tensor in dtypes] == [
        torch.int64,
        torch.int64,
        torch.bool,
        torch.int64,
        torch.int32,
        torch.int32,
    ]
    assert (batch.source_ids.dtype, batch.sample_ids.dtype) == (torch.int32, torch.int64)


def test_without_isolation_every_row_is_one_document(two_sources):
    batch = next(loader(settings(two_sources[0])).steps())[0]
    assert torch.equal(batch.labels[:, :-1], batch.tokens[:, 1:]) and batch.loss_mask.all()
    assert torch.equal(batch.labels, batch.tokens + 1)  # across borders too: ids count up through the file
    assert batch.position_ids.tolist() == [list(range(16))] * 2
    assert batch.seq_idx.tolist() == [[0] * 16, [1] * 16] and batch.cu_seqlens.tolist() == [0, 16, 32]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_isolated_documents_follow_the_corpus(two_sources, packing):
    """Read the documents of each row back by cu_seqlens: consecutive tokens, right labels, borders and padding
    masked.
    """
    lengths = random_lengths(0, 60, 11)
    starts = set(np.cumsum([0, *lengths]).tolist())
    for step in take(loader(settings(two_sources[0], packing=packing, document_mask=True)).steps(), 6):
        for batch in step:
            bounds = torch.unique(batch.cu_seqlens).tolist()
            assert {0, 16, 32} <= set(bounds)
            assert batch.max_seqlen == max(np.diff(bounds))
            assert batch.num_tokens == int(batch.loss_mask.sum())
            flat = [
                getattr(batch, name).reshape(-1)
                for name in ("tokens", "labels", "loss_mask", "position_ids", "seq_idx")
            ]
            for number, (begin, end) in enumerate(pairwise(bounds)):
                tokens, labels, counted, positions, documents = (part[begin:end].tolist() for part in flat)
                assert positions == list(range(end - begin)) and documents == [number] * (end - begin)
                if tokens[0] == 0 and not any(counted) and end % 16 == 0 and len(set(tokens)) == 1:
                    continue  # padding (or the masked one-token document 0)
                assert tokens == list(range(tokens[0], tokens[0] + end - begin))
                assert all(
                    label == token + 1 for token, label in zip(tokens, labels, strict=True) if token + 1 < sum(lengths)
                )
                assert counted == [token + 1 not in starts for token in tokens]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_best_fit_and_concat_read_everything_once_per_epoch(two_sources, packing):
    data = loader(settings(two_sources[0], packing=packing, document_mask=True), global_batch=2)
    rows = data.sources[0].train.num_rows
    steps = take(data.steps(), rows // 2)
    seen = torch.cat([batch.tokens[batch.loss_mask] for step in steps for batch in step])
    assert len(torch.unique(seen)) == len(seen)
    borders = np.cumsum(random_lengths(0, 60, 11)) - 1  # the last token of a document has no label that counts
    everything = set(range(rows * 16 if packing == "concat" else borders[-1])) - set(borders.tolist())
    missed = everything - set(seen.tolist())
    assert len(missed) <= (16 if rows % 2 else 0)  # an odd last row is in the next step


def test_best_fit_without_isolation_labels_the_next_token_of_the_row(two_sources):
    for step in take(loader(settings(*two_sources, packing="best_fit")).steps(), 5):
        for batch in step:
            inner = batch.loss_mask[:, :-1]
            assert torch.equal(batch.labels[:, :-1][inner], batch.tokens[:, 1:][inner]) and inner.any()


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_the_corpus_mask_applies_to_labels(two_sources, packing, document_mask):
    data = loader(settings(two_sources[1], packing=packing, document_mask=document_mask))
    for step in take(data.steps(), 4):
        for batch in step:
            # The mask of the test file: 1 where the token is no multiple of 3.
            assert (batch.labels[batch.loss_mask] % 3 > 0).all() and batch.loss_mask.any()
            assert packing == "best_fit" or document_mask or torch.equal(batch.loss_mask, batch.labels % 3 > 0)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_resuming_at_a_step_gives_the_batches_of_running_through(two_sources, packing):
    data = settings(*two_sources, packing=packing, document_mask=True)
    through = take(loader(data).steps(), 30)
    for start in (1, 17, 29):
        resumed = next(loader(data).steps(start))
        assert all(same(a, b) for a, b in zip(resumed, through[start], strict=True))


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(1, 8), (2, 1), (4, 2), (8, 1)])
def test_the_samples_of_a_step_do_not_depend_on_the_layout(two_sources, dp_size, micro_batch):
    def rows(step: list[PackedBatch]) -> dict[int, list]:
        return {
            int(batch.sample_ids[i]): [batch.tokens[i].tolist(), batch.labels[i].tolist(), int(batch.source_ids[i])]
            for batch in step
            for i in range(len(batch.sample_ids))
        }

    data = settings(*two_sources)
    alone = take(loader(data).steps(2), 3)
    ranks = [
        take(loader(data, dp_rank=rank, dp_size=dp_size, micro_batch=micro_batch).steps(2), 3)
        for rank in range(dp_size)
    ]
    for step in range(3):
        merged = {}
        for rank in ranks:
            assert len(rank[step]) == 8 // (dp_size * micro_batch)
            merged |= rows(rank[step])
        assert merged == rows(alone[step]) and sorted(merged) == list(range(8 * (step + 2), 8 * (step + 3)))


def test_the_mixture_is_that_of_the_weights(two_sources):
    data = loader(settings(*two_sources))
    ids = torch.cat([batch.source_ids for step in take(data.steps(), 30) for batch in step])
    assert torch.bincount(ids).tolist() == [80, 160] == data.mixture.counts(240).tolist()
    assert data.epochs_after(240)[0] == 80 / data.sources[0].train.num_rows
    assert "share 33.33%" in data.report(240)[0]


def test_stages_in_the_middle_read_lengths_only(two_sources):
    data = settings(*two_sources, document_mask=True)
    ends = next(loader(data).steps())
    middle = loader(data, needs_tokens=False, needs_labels=False)
    for source in middle.sources:
        source.file._bin.close()  # reading a token would raise
    for with_tokens, without in zip(ends, next(middle.steps()), strict=True):
        assert without.tokens is without.labels is without.loss_mask is None and without.num_tokens == 0
        for name in ("position_ids", "seq_idx", "cu_seqlens", "source_ids", "sample_ids"):
            assert torch.equal(getattr(without, name), getattr(with_tokens, name))


def test_first_and_last_stage_get_their_half(two_sources):
    data = settings(*two_sources, packing="best_fit")
    both = next(loader(data).steps())[0]
    first = next(loader(data, needs_labels=False).steps())[0]
    last = next(loader(data, needs_tokens=False).steps())[0]
    assert torch.equal(first.tokens, both.tokens) and first.labels is None and first.loss_mask is None
    assert torch.equal(last.labels, both.labels) and torch.equal(last.loss_mask, both.loss_mask) and last.tokens is None
    assert (first.num_tokens, last.num_tokens) == (0, both.num_tokens)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_validation_shares_no_token_with_training_and_is_the_same_in_every_layout(two_sources, packing):
    data = settings(*two_sources, packing=packing, validation_fraction=0.2, document_mask=True)
    alone = loader(data)
    train = {
        int(token) for step in take(alone.steps(), 40) for batch in step for token in batch.tokens[batch.loss_mask]
    }
    for source in (0, 1):
        batches = list(alone.validation_batches(source))
        held = {int(token) for batch in batches for token in batch.tokens[batch.loss_mask]}
        assert held and not held & train
        assert all(same(a, b) for a, b in zip(batches, alone.validation_batches(source), strict=True))
        three = list(alone.validation_batches(source, max_samples=3))
        ranks = [
            list(loader(data, dp_size=2, dp_rank=rank, micro_batch=1).validation_batches(source, max_samples=3))
            for rank in (0, 1)
        ]
        assert [len(rank) for rank in ranks] == [2, 2]  # one row is a filler, which counts nothing
        counted = sorted(int(token) for rank in ranks for batch in rank for token in batch.labels[batch.loss_mask])
        assert counted == sorted(int(token) for batch in three for token in batch.labels[batch.loss_mask])
        assert len(set(counted)) == len(counted)
        assert sum(int((batch.sample_ids >= 0).sum()) for batch in three) == 3


def test_reading_ahead_changes_nothing_and_stops_with_the_iterator(two_sources):
    data = settings(*two_sources)
    steps = loader(data.model_copy(update={"prefetch_steps": 3})).steps(5)
    ahead = take(steps, 4)
    assert any(thread.name == "data" for thread in threading.enumerate())
    steps.close()
    assert not any(thread.name == "data" for thread in threading.enumerate())
    assert all(
        same(a, b)
        for s, t in zip(ahead, take(loader(data).steps(5), 4), strict=True)
        for a, b in zip(s, t, strict=True)
    )


def test_errors_of_the_reading_thread_arrive_in_the_loop(two_sources):
    data = loader(settings(*two_sources, prefetch_steps=2), vocab_size=10_000)
    with pytest.raises(
        TokenFileError, match=r"two\.bin: token id \d+ in document \d+ \(sample \d+\) is outside .* 10000"
    ):
        take(data.steps(), 20)
    assert not any(thread.name == "data" for thread in threading.enumerate())


def test_a_token_outside_the_vocabulary_names_its_document(tmp_path):
    path = write_tokens(tmp_path / "c", [20, 20, 20])
    with pytest.raises(TokenFileError, match=r"c\.bin: token id 45 in document 2 "):
        take(loader(settings(path), vocab_size=45).steps(), 2)


def test_the_manifest_tells_of_a_token_outside_the_vocabulary_at_once(tmp_path):
    with TokenFileWriter(tmp_path / "c", np.uint16) as writer:
        writer.add(np.full(40, 9), np.array([40]))
        writer.manifest = {"max_token_id": 9, "max_token_document": 0}
    with pytest.raises(TokenFileError, match=r"c\.bin: token id 9 in document 0 .* vocabulary of 9"):
        loader(settings(str(tmp_path / "c")), vocab_size=9)


def test_a_negative_token_id_is_an_error(tmp_path):
    with TokenFileWriter(tmp_path / "c", np.int32) as writer:
        writer.add(np.full(40, -1), np.array([40]))
    with pytest.raises(TokenFileError, match="token id -1"):
        next(loader(settings(str(tmp_path / "c"))).steps())


@pytest.mark.parametrize(
    ("lengths", "message"), [([0, 0], "no tokens"), ([], "no tokens"), ([9, 7], "16 training tokens, fewer")]
)
def test_an_empty_source_is_named(tmp_path, lengths, message):
    path = write_tokens(tmp_path / "c", lengths)
    with pytest.raises(TokenFileError, match=rf"c\.bin: {message}"):
        loader(settings(path))


def test_a_validation_part_without_a_whole_row_is_named(tmp_path):
    path = write_tokens(tmp_path / "c", [40, 40, 5])
    with pytest.raises(TokenFileError, match=r"c\.bin: 5 validation tokens, fewer"):
        loader(settings(path, validation_fraction=0.05))


def test_sources_of_two_tokenizers_are_refused(tmp_path):
    for name in ("a", "b"):
        with TokenFileWriter(tmp_path / name, np.uint16) as writer:
            writer.add(np.arange(40), np.array([40]))
            writer.manifest = {"tokenizer_sha256": name}
    with pytest.raises(TokenFileError, match="different tokenizers"):
        loader(settings(str(tmp_path / "a"), str(tmp_path / "b")))


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(TokenFileError, match=r"nowhere\.idx: no such file"):
        loader(settings(str(tmp_path / "nowhere")))


def test_a_global_batch_that_does_not_divide_is_an_error(two_sources):
    with pytest.raises(ValueError, match=r"global_batch=10 is not a multiple of micro_batch\*dp=4; try 12"):
        loader(settings(*two_sources), global_batch=10, dp_size=2)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_what_the_idx_leaves_out_is_never_trained_on(tmp_path, packing):
    """Every second document of 40; the epoch is that of a file that never had the others."""
    path = write_tokens(tmp_path / "c", [20] * 40)
    kept = np.arange(0, 40, 2)
    lengths, pointers = np.full(20, 20, np.int32), 2 * 20 * kept
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 20, 21)
    with open(f"{path}.idx", "wb") as idx:
        idx.writelines([head, lengths.data, pointers.data, np.arange(21).data])
    (tmp_path / "c.json").unlink()
    with TokenFileWriter(tmp_path / "alone", np.uint16) as writer:
        writer.add(np.concatenate([np.arange(20 * n, 20 * n + 20) for n in kept]), lengths)
    filtered, alone = (
        [batch for step in take(loader(settings(p, packing=packing)).steps(), 6) for batch in step]
        for p in (path, str(tmp_path / "alone"))
    )
    assert all(same(one, other) for one, other in zip(filtered, alone, strict=True))
    seen = torch.cat([batch.tokens[batch.loss_mask] for batch in filtered])
    assert set((seen // 20 % 2).tolist()) == {0}


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("cp", [2, 4])
def test_context_parallel_ranks_read_their_chunks_of_the_same_batches(two_sources, packing, document_mask, cp):
    data = settings(*two_sources, packing=packing, document_mask=document_mask)
    whole = [batch for step in take(loader(data).steps(), 6) for batch in step]
    for rank in range(cp):
        mine = [batch for step in take(loader(data, cp_size=cp, cp_rank=rank).steps(), 6) for batch in step]
        assert all(same(batch, other.shard(cp, rank)) for batch, other in zip(mine, whole, strict=True))


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_context_parallel_rank_reads_its_share_of_the_bytes(tmp_path, monkeypatch, document_mask):
    path = write_tokens(tmp_path / "long", random_lengths(2, 300, 100), mask=True)
    data = settings(path, seq_len=1024, document_mask=document_mask)
    read = []
    for name in ("read", "read_mask"):
        original = getattr(TokenFile, name)
        monkeypatch.setattr(TokenFile, name, lambda *a, original=original: (read.append(a[2].nbytes), original(*a)))

    def bytes_of(**ranks) -> int:
        read.clear()
        take(loader(data, **ranks).steps(), 4)
        return sum(read)

    whole = bytes_of()
    for cp in (2, 4):
        shares = [bytes_of(cp_size=cp, cp_rank=rank) for rank in range(cp)]
        # Two chunks of each of 4 x 4 micro-batches, each with a token and a label more, of 2 + 1 bytes.
        assert all(share <= whole / cp + 4 * 4 * 2 * 2 * 3 + 300 for share in shares)
