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

from prism_mcore.data.token_file import TokenFile, TokenFileError, TokenFileWriter, token_dtype


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
