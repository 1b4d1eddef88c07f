"""Token files: the same as megatron-core's, whole or not there, and never taken for what they are not."""

import os
import resource
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from tiny.token_files import random_lengths, write_tokens

from prism_mcore.data import token_index
from prism_mcore.data.token_file import TokenFile, TokenFileError, TokenFileWriter, narrowed, token_dtype


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_what_we_write(tmp_path, dtype):
    lengths = random_lengths(0, 50, 20)
    prefix = write_tokens(tmp_path / "c", lengths, dtype=dtype)
    theirs = IndexedDataset(prefix)
    assert theirs.sequence_lengths.tolist() == lengths and len(theirs.document_indices) == 51
    assert np.array_equal(np.concatenate([theirs[i] for i in range(50)]), np.arange(sum(lengths)))


def test_we_read_what_megatron_writes_with_several_sequences_in_a_document(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.int32)
    builder.add_document(torch.arange(0, 10), [4, 6])
    builder.add_document(torch.arange(10, 15), [5])
    builder.add_document(torch.arange(15, 15), [0])
    builder.add_document(torch.arange(15, 22), [3, 4])
    builder.finalize(str(tmp_path / "c.idx"))
    ours = TokenFile(tmp_path / "c.bin")
    assert (ours.num_documents, ours.num_tokens, ours.dtype) == (4, 22, np.int32)
    assert ours.document_starts(0, 5).tolist() == [0, 10, 15, 15, 22]
    # Token 15 belongs to the last document, not to the empty one before it.
    assert [ours.documents_until(token) for token in (0, 9, 10, 14, 15, 21)] == [1, 1, 2, 2, 4, 4]
    assert [found.tolist() for found in ours.starts_between(np.array([0, 10]), np.array([15, 14]))] == [
        [10, 15, 15],
        [],
    ]
    out = np.empty(3, np.int32)
    ours.read(13, out)
    assert out.tolist() == [13, 14, 15]


def test_searches_agree_with_numpy(tmp_path):
    lengths = [length % 9 for length in random_lengths(1, 5000, 7)]  # some empty
    ours = TokenFile(write_tokens(tmp_path / "c", lengths))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    begins = np.random.default_rng(0).integers(0, starts[-1], 300)
    begins[:2] = 0, starts[-1] - 1
    ends = np.minimum(begins + np.random.default_rng(1).integers(1, 12_000, 300), starts[-1])
    for begin, end, found in zip(begins, ends, ours.starts_between(begins, ends), strict=True):
        assert np.array_equal(found, starts[(starts > begin) & (starts <= end)])
        assert ours.documents_until(int(begin)) == np.searchsorted(starts[:-1], begin, side="right")


@pytest.mark.parametrize(("vocab", "dtype"), [(65_499, np.uint16), (65_500, np.int32)])
def test_dtype_is_megatrons(vocab, dtype):
    from megatron.core.datasets.indexed_dataset import DType

    assert token_dtype(vocab) == dtype == DType.optimal_dtype(vocab)


def test_a_truncated_bin_is_named_with_its_sizes(tmp_path):
    prefix = write_tokens(tmp_path / "c", [5, 5])
    os.truncate(f"{prefix}.bin", 13)
    with pytest.raises(TokenFileError, match=r"c\.bin: 13 bytes, needs 20"):
        TokenFile(prefix)


def test_a_bin_cut_while_it_is_open_is_an_error_not_a_crash(tmp_path):
    prefix = write_tokens(tmp_path / "c", [5, 5])
    opened = TokenFile(prefix)
    os.truncate(f"{prefix}.bin", 12)
    with pytest.raises(TokenFileError, match=r"c\.bin: got 12 of 20 bytes"):
        opened.read(0, np.empty(10, np.uint16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: b"TNTIDX\x00\x00" + raw[8:], "not a Megatron .idx"),
        (lambda raw: raw[:20], "not a Megatron .idx"),
        (lambda raw: raw[:9] + struct.pack("<Q", 2) + raw[17:], "version 2"),
        (lambda raw: raw[:17] + b"\x07" + raw[18:], "dtype code 7"),
        (lambda raw: raw[:-3], "bytes, needs"),
    ],
)
def test_an_idx_of_another_format_is_named(tmp_path, change, message):
    prefix = write_tokens(tmp_path / "c", [5, 5])
    raw = (tmp_path / "c.idx").read_bytes()
    (tmp_path / "c.idx").write_bytes(change(raw))
    with pytest.raises(TokenFileError, match=rf"c\.idx: .*{message}"):
        TokenFile(prefix)


def test_side_files_that_do_not_belong_are_named(tmp_path):
    prefix = write_tokens(tmp_path / "c", [5, 5], mask=True)
    os.truncate(f"{prefix}.mask", 9)
    with pytest.raises(TokenFileError, match=r"c\.mask: 9 bytes, needs one for each of 10"):
        TokenFile(prefix)
    os.remove(f"{prefix}.mask")
    (tmp_path / "c.json").write_text('{"tokens": 11}')
    with pytest.raises(TokenFileError, match=r"c\.json: speaks of 11 tokens"):
        TokenFile(prefix)


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), TokenFileWriter(tmp_path / "c", np.uint16) as writer:
        writer.add(np.arange(5), np.array([5]))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_older_file(tmp_path):
    """RLIMIT_FSIZE stands in for the full disk: the write fails in the same place, with EFBIG instead of ENOSPC."""
    prefix = write_tokens(tmp_path / "c", [5, 5])
    script = f"""
import resource, signal, numpy as np
from prism_mcore.data.token_file import TokenFileWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
with TokenFileWriter({prefix!r}, np.uint16) as writer:
    writer.add(np.zeros(100_000), np.array([100_000]))
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode != 0 and "OSError" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx", "c.json"]
    assert TokenFile(prefix).num_tokens == 10


def test_replacing_a_masked_file_by_one_without_removes_the_mask(tmp_path):
    write_tokens(tmp_path / "c", [5, 5], mask=True)
    prefix = write_tokens(tmp_path / "c", [7])
    assert not TokenFile(prefix).has_mask


# --- the .idx is checked whole ----------------------------------------------------------------------------------------

LENGTHS = [3, 0, 5, 2, 4, 1, 6, 2]
FIRST = np.cumsum([0, *LENGTHS])  # a token's id is its place in the .bin


def write_index(prefix, lengths, pointers, documents):
    """An .idx of these parts, pointers in tokens, beside a .bin of 23 tokens of int32."""
    write_tokens(prefix, LENGTHS, dtype=np.int32)
    os.remove(f"{prefix}.json")
    parts = np.array(lengths, np.int32), 4 * np.array(pointers, np.int64), np.array(documents, np.int64)
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, len(lengths), len(documents))
    with open(f"{prefix}.idx", "wb") as idx:
        idx.writelines([head, *(part.data for part in parts)])
    return prefix


def whole(file):
    out = np.empty(file.num_tokens, file.dtype)
    file.read(0, out)
    return out.tolist()


@pytest.mark.parametrize("at_once", [1 << 15, 3])
@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([0, 1, 2, 3, 4], "ends at 4, needs 8, the number of sequences"),
        ([0, 1, 2, 3, 0, 1, 2, 3, 8], "falls at entry 4"),
        ([0, 1, 2, 3, 5, 4, 6, 7, 8], "falls at entry 5"),
        ([1, 2, 3, 4, 5, 6, 7, 8], "starts at 1, needs 0"),
        ([-1, 8], "starts at -1, needs 0"),
        ([0, 9, 8], "falls at entry 2"),
        ([0], "ends at 0, needs 8"),
    ],
)
def test_a_document_index_that_loses_sequences_is_named(tmp_path, monkeypatch, at_once, documents, message):
    monkeypatch.setattr(token_index, "_AT_ONCE", at_once)
    prefix = write_index(tmp_path / "c", LENGTHS, FIRST[:-1], documents)
    with pytest.raises(TokenFileError, match=rf"c\.idx: its document index {message}"):
        TokenFile(prefix)


@pytest.mark.parametrize("at_once", [1 << 15, 3])
def test_as_many_documents_as_sequences_need_not_be_them(tmp_path, monkeypatch, at_once):
    """Nine entries for eight sequences: an empty document, and one of two sequences."""
    monkeypatch.setattr(token_index, "_AT_ONCE", at_once)
    file = TokenFile(write_index(tmp_path / "c", LENGTHS, FIRST[:-1], [0, 0, 2, 3, 4, 5, 6, 7, 8]))
    assert file.document_starts(0, 9).tolist() == [0, 0, 3, 8, 10, 14, 15, 21, 23]


@pytest.mark.parametrize("at_once", [1 << 15, 2])
@pytest.mark.parametrize("kept", [[0, 2, 3, 5, 6], [2, 3, 6], [6, 0, 4], [5, 5], [7, 6, 5, 4, 3, 2, 1, 0]])
def test_what_the_idx_leaves_out_or_reorders_is_read_as_megatron_does(tmp_path, monkeypatch, at_once, kept):
    monkeypatch.setattr(token_index, "_AT_ONCE", at_once)
    lengths = [LENGTHS[i] for i in kept]
    prefix = write_index(tmp_path / "c", lengths, FIRST[kept], range(len(kept) + 1))
    mask = np.arange(23) % 3 > 0
    (tmp_path / "c.mask").write_bytes(mask.astype(np.uint8).tobytes())
    ours = TokenFile(prefix)
    dataset = IndexedDataset(str(prefix))  # its documents are views that die with it
    theirs = np.concatenate(list(dataset))
    assert whole(ours) == theirs.tolist() and ours.num_tokens == len(theirs)
    assert ours.document_starts(0, len(kept) + 1).tolist() == np.cumsum([0, *lengths]).tolist()
    counted = np.empty(ours.num_tokens, np.uint8)
    ours.read_mask(0, counted)
    assert counted.tolist() == mask[theirs].tolist()
    for start in range(ours.num_tokens):
        for stop in range(start, ours.num_tokens + 1):
            out = np.empty(stop - start, np.int32)
            ours.read(start, out)
            assert out.tolist() == theirs[start:stop].tolist()


def test_a_filtered_idx_of_several_sequences_in_a_document(tmp_path):
    kept = [0, 2, 4, 5, 7]
    file = TokenFile(write_index(tmp_path / "c", [LENGTHS[i] for i in kept], FIRST[kept], [0, 2, 3, 5]))
    assert file.document_starts(0, 4).tolist() == [0, 8, 12, 15]
    assert whole(file) == [0, 1, 2, *range(3, 8), *range(10, 14), 14, 21, 22]


@pytest.mark.parametrize("at_once", [1 << 15, 3])
@pytest.mark.parametrize(
    ("lengths", "pointers", "message"),
    [
        ([3, -1, 6], [0, 3, 2], r"c\.idx: sequence 1 has length -1"),
        ([3, 5], [0, -2], r"c\.idx: sequence 1 starts at byte -8"),
        ([3, 5], [0, 0.5], r"c\.idx: sequence 1 starts at byte 2"),
        ([3, 5], [0, 2**61 - 1], r"c\.idx: sequence 1 starts at byte"),
        ([3, 5], [0, 20], r"c\.bin: 92 bytes, needs .* at least 100"),
        ([3, 5], [0, 3], r"c\.bin: 92 bytes, needs 32 by its \.idx"),
    ],
)
def test_an_idx_that_points_nowhere_is_named(tmp_path, monkeypatch, at_once, lengths, pointers, message):
    monkeypatch.setattr(token_index, "_AT_ONCE", at_once)
    pointers = [int(4 * pointer) for pointer in pointers]
    prefix = write_index(tmp_path / "c", lengths, [0] * len(lengths), range(len(lengths) + 1))
    raw = bytearray((tmp_path / "c.idx").read_bytes())
    place = 34 + 4 * len(lengths)
    raw[place : place + 8 * len(lengths)] = np.array(pointers, np.int64).tobytes()
    (tmp_path / "c.idx").write_bytes(raw)
    with pytest.raises(TokenFileError, match=message):
        TokenFile(prefix)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"tokens": "10"}', "tokens is '10', needs int"),
        ('{"tokens": 10, "max_token_id": "9"}', "max_token_id is '9', needs int"),
        ('{"tokens": 10, "content_sha256": 3}', "content_sha256 is 3, needs str"),
        ("[10]", "not a manifest"),
        ("[" * 100_000, "not a manifest"),
        ('{"tokens": 10', "not a manifest"),
    ],
)
def test_a_manifest_is_checked_where_it_is_read(tmp_path, text, message):
    prefix = write_tokens(tmp_path / "c", [5, 5])
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(TokenFileError, match=rf"c\.json: .*{message}"):
        TokenFile(prefix)


# --- numbers that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [70_000, -1, 65_536, 2**40, 0.5, float("nan")])
def test_a_number_that_does_not_fit_is_refused_not_wrapped(tmp_path, value):
    assert narrowed([1, 65_535], np.uint16).tolist() == [1, 65_535]
    with pytest.raises(ValueError, match="does not fit uint16"):
        narrowed(np.array([1, value]), np.uint16)
    with (
        pytest.raises(ValueError, match="does not fit uint16"),
        TokenFileWriter(tmp_path / "c", np.uint16) as writer,
    ):
        writer.add(np.array([1, value]), [2])
    assert list(tmp_path.iterdir()) == []


def test_the_identity_of_a_file_is_its_content(tmp_path):
    file = TokenFile(write_tokens(tmp_path / "a", [50, 70]))
    assert file.identity == TokenFile(write_tokens(tmp_path / "b", [50, 70])).identity
    others = [
        write_tokens(tmp_path / "c", [70, 50]),
        write_tokens(tmp_path / "d", [50, 70], first=1),
        write_tokens(tmp_path / "e", [50, 70], dtype=np.int32),
        write_tokens(tmp_path / "f", [50, 70], mask=True),
    ]
    assert len({file.identity, *(TokenFile(other).identity for other in others)}) == 5


def test_a_manifests_hash_counts_where_samples_see_nothing(tmp_path):
    """Two files that differ in one token between the samples."""
    tokens = np.zeros(1 << 20, np.uint16)
    identities = set()
    for name in ("a", "b"):
        with TokenFileWriter(tmp_path / name, np.uint16) as writer:
            writer.add(tokens, [len(tokens)])
            writer.manifest = {"content_sha256": name}
        identities.add(TokenFile(tmp_path / name).identity)
        tokens[5_000] = 1
    assert len(identities) == 2
