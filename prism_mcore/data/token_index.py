"""PREFIX.idx of a Megatron token file: where its documents are. Checked whole when it is opened.

Layout, little endian (megatron/core/datasets/indexed_dataset.py): 9 bytes "MMIDIDX\\0\\0", u64 version 1, u8 dtype
code, u64 number of sequences n, u64 number of entries m in the document index, then int32[n] sequence lengths in
tokens, int64[n] sequence starts in bytes, int64[m] first sequence of each document and the end.
"""

# n sequences, m entries of the document index

import os
import struct
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.integer]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_AT_ONCE = 1 << 15  # entries checked together: they stay in the cache


class TokenFileError(ValueError):
    """A token file that cannot be read as what it claims to be; the message names the file."""


class TokenIndex:
    """An .idx opened for reading, in memory that does not grow with the corpus; checked whole, at 150 M entries a s.

    Positions are in tokens and count what the .idx lists, one document after the other. In nearly every file that is
    where they lie in the .bin. A filtered or reordered .idx leaves parts of its .bin out, or takes them in another
    order: `pieces` says where they lie, and its starts are held in memory, as are those of a file with several
    sequences in a document. Documents of length 0 (other writers make them) have no position; their starts repeat that
    of the next document.
    """

    def __init__(self, path: str):
        self.path, self._file = path, open_part(path)
        self.dtype, self._n, self._m = _read_header(self._file, path)
        self.num_documents = self._m - 1
        self._pointers_at = _HEADER.size + 4 * self._n
        self._documents_at = self._pointers_at + 8 * self._n
        wanted, got = self._documents_at + 8 * self._m, os.fstat(self._file.fileno()).st_size
        if got not in (wanted, wanted + self._n):  # the latter: one mode byte per sequence (multimodal)
            raise TokenFileError(f"{path}: {got} bytes, needs {wanted} for {self._n} sequences; tokenize it again")
        self.num_tokens, contiguous = self._check_sequences()
        self._runs = None if contiguous else self._find_runs()
        one_each = self._check_documents()
        self._starts = None if contiguous and one_each else self._starts_in_memory(one_each)
        self._stride = max(1024, self.num_documents >> 13)

    def check_bin(self, size: int, path: str) -> None:
        """Raises TokenFileError where a .bin of `size` bytes cannot be this index's."""
        if self._runs is None:
            wanted = self.num_tokens * self.dtype.itemsize
            if size != wanted:
                raise TokenFileError(
                    f"{path}: {size} bytes, needs {wanted} by its .idx; the file is truncated or belongs to another"
                    " .idx: copy or tokenize it again"
                )
        elif size % self.dtype.itemsize or size < self._reach:
            raise TokenFileError(
                f"{path}: {size} bytes, needs whole tokens of {self.dtype.itemsize} bytes and at least {self._reach} by"
                " its .idx: copy or tokenize it again"
            )

    def document_starts(self, first: int, stop: int) -> np.ndarray:
        """First token of documents first..stop-1: int64. Document n, past the last, starts where the file ends."""
        if self._starts is not None:
            return self._starts[first:stop]
        inside = self._read(self._pointers_at + 8 * first, min(stop, self.num_documents) - first, np.int64)
        inside //= self.dtype.itemsize
        return np.append(inside, self.num_tokens) if stop > self.num_documents else inside

    def starts_between(self, begins: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
        """For each range of tokens the starts of documents in (begin, end], ascending: int64 [k], [k] -> k arrays."""
        starts = []
        blocks = np.searchsorted(self._landmarks, begins, side="right") - 1
        for block, begin, end in zip(blocks.tolist(), begins.tolist(), ends.tolist(), strict=True):
            first, stop = block * self._stride, min((block + 1) * self._stride, self.num_documents) + 1
            near = self.document_starts(first, stop)
            while near[-1] <= end and stop <= self.num_documents:
                more = self.document_starts(stop, min(stop + self._stride, self.num_documents + 1))
                near, stop = np.concatenate([near, more]), stop + len(more)
            low, high = near.searchsorted((begin, end), side="right")
            starts.append(near[low:high])
        return starts

    def documents_until(self, token: int) -> int:
        """The number of documents that start at or before a token; one less is the number of the document it is in."""
        block = int(np.searchsorted(self._landmarks, token, side="right")) - 1
        first = block * self._stride
        near = self.document_starts(first, min(first + self._stride, self.num_documents))
        return first + int(near.searchsorted(token, side="right"))

    def pieces(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Where `count` tokens from position `start` on lie in the .bin: (token there, first, stop) of those asked."""
        if self._runs is None:
            yield start, 0, count
            return
        begins, places = self._runs  # the last begin is num_tokens
        run, done = int(begins.searchsorted(start, side="right")) - 1, 0
        while done < count:
            offset = start + done - int(begins[run])
            here = min(count - done, int(begins[run + 1] - begins[run]) - offset)
            yield int(places[run]) + offset, done, done + here
            done, run = done + here, run + 1

    def close(self) -> None:
        self._file.close()

    @cached_property
    def _landmarks(self) -> np.ndarray:
        """The start of every stride-th document, at most some 10,000 of them: int64."""
        documents = range(0, max(1, self.num_documents), self._stride)
        return np.concatenate([self.document_starts(document, document + 1) for document in documents])

    def _check_sequences(self) -> tuple[int, bool]:
        """The number of tokens, and whether each sequence starts where the one before it ends."""
        tokens, contiguous = 0, True
        for first in range(0, self._n, _AT_ONCE):
            count = min(_AT_ONCE, self._n - first)
            lengths = self._read(_HEADER.size + 4 * first, count, np.int32)
            if lengths.min() < 0:
                bad = int(lengths.argmin())
                raise TokenFileError(
                    f"{self.path}: sequence {first + bad} has length {lengths[bad]}, which cannot be; tokenize it again"
                )
            if contiguous:
                starts = self._read(self._pointers_at + 8 * first, count, np.int64)
                between = np.multiply(lengths[:-1], self.dtype.itemsize, dtype=np.int64)
                contiguous = starts[0] == tokens * self.dtype.itemsize and np.array_equal(np.diff(starts), between)
            tokens += int(lengths.sum(dtype=np.int64))
        return tokens, bool(contiguous)

    def _find_runs(self) -> tuple[np.ndarray, np.ndarray]:
        """Runs of sequences that follow each other in the .bin: position of each and the end, and its token there."""
        lengths = self._read(_HEADER.size, self._n, np.int32).astype(np.int64)
        pointers = self._read(self._pointers_at, self._n, np.int64)
        limit = np.iinfo(np.int64).max - lengths * self.dtype.itemsize
        wrong = (pointers < 0) | (pointers % self.dtype.itemsize != 0) | (pointers > limit)
        if wrong.any():
            bad = int(wrong.argmax())
            raise TokenFileError(
                f"{self.path}: sequence {bad} starts at byte {pointers[bad]}, which is no token's; tokenize it again"
            )
        self._reach = int((pointers + lengths * self.dtype.itemsize).max())
        held = lengths > 0
        lengths, places = lengths[held], pointers[held] // self.dtype.itemsize
        begins = np.cumsum(lengths) - lengths
        heads = np.append(True, places[1:] != places[:-1] + lengths[:-1])[: len(places)]
        return np.append(begins[heads], self.num_tokens), places[heads]

    def _check_documents(self) -> bool:
        """Whether document i is sequence i, as nearly always."""
        if self._m == self._n + 1:
            counting = np.arange(min(_AT_ONCE, self._m))
            for first in range(0, self._m, _AT_ONCE):
                count = min(_AT_ONCE, self._m - first)
                entries = self._read(self._documents_at + 8 * first, count, np.int64)
                entries -= first
                if not np.array_equal(entries, counting[:count]):
                    break
            else:
                return True
        entries = self._read(self._documents_at, self._m, np.int64)
        problem = (
            f"starts at {entries[0]}, needs 0"
            if entries[0] != 0
            else f"ends at {entries[-1]}, needs {self._n}, the number of sequences"
            if entries[-1] != self._n
            else f"falls at entry {1 + int((np.diff(entries) < 0).argmax())}"
            if (np.diff(entries) < 0).any()
            else None
        )
        if problem:
            raise TokenFileError(
                f"{self.path}: its document index {problem}: some sequences belong to no document or to two, as after a"
                " merge gone wrong; merge or tokenize it again"
            )
        return False

    def _starts_in_memory(self, one_each: bool) -> np.ndarray:
        """First token of every document and the end: int64 [documents + 1]."""
        lengths = self._read(_HEADER.size, self._n, np.int32)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        return starts if one_each else starts[self._read(self._documents_at, self._m, np.int64)]

    def _read(self, offset: int, count: int, dtype: type[np.integer]) -> np.ndarray:
        out = np.empty(count, dtype)
        read_exactly(self._file, offset, out, self.path)
        return out


def index_parts(lengths: np.ndarray, dtype: np.dtype) -> Iterable[Any]:
    """The .idx of one sequence per document, part by part."""
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    yield _HEADER.pack(_MAGIC, 1, _CODES[dtype], len(lengths), len(lengths) + 1)
    yield lengths.data
    yield (ends - lengths.astype(np.int64) * dtype.itemsize).data
    yield np.arange(len(lengths) + 1, dtype=np.int64).data


def open_part(path: str) -> BinaryIO:
    try:
        return open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise TokenFileError(f"{path}: no such file; a source's path is the prefix of a .bin and an .idx") from None


def read_exactly(stream: BinaryIO, offset: int, out: np.ndarray, path: str) -> None:
    """Fill `out` (contiguous) with what a file holds at `offset`; TokenFileError where it ends before."""
    if out.size == 0:
        return
    view = out.view(np.uint8).data
    got = os.preadv(stream.fileno(), [view], offset)
    while 0 < got < len(view):  # the kernel may deliver less than asked, at most 2 GiB at once
        more = os.preadv(stream.fileno(), [view[got:]], offset + got)
        if more == 0:
            break
        got += more
    if got != len(view):
        raise TokenFileError(
            f"{path}: got {got} of {len(view)} bytes at {offset}; the file was truncated while it was being read"
        )


def _read_header(idx: BinaryIO, path: str) -> tuple[np.dtype, int, int]:
    head = idx.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise TokenFileError(f"{path}: not a Megatron .idx (starts with {head[:9]!r}, needs {_MAGIC!r})")
    _, version, code, num_sequences, num_entries = _HEADER.unpack(head)
    if version != 1:
        raise TokenFileError(f"{path}: .idx version {version}, only 1 is known")
    if code not in _DTYPES:
        raise TokenFileError(f"{path}: dtype code {code}; token ids need one of {sorted(_DTYPES)}")
    if num_entries == 0:
        raise TokenFileError(f"{path}: its document index is empty, it needs at least the end of the file")
    return np.dtype(_DTYPES[code]), num_sequences, num_entries
