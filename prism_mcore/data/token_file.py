"""Megatron's token files: PREFIX.bin (token ids, document after document) and PREFIX.idx (where documents start).

Layout of the .idx, little endian (megatron/core/datasets/indexed_dataset.py): 9 bytes "MMIDIDX\\0\\0", u64 version 1,
u8 dtype code, u64 number of sequences n, u64 number of entries m in the document index, then int32[n] sequence lengths
in tokens, int64[n] sequence starts in bytes, int64[m] first sequence of each document and the end.

Two more files may stand beside them: PREFIX.mask, one uint8 per token (1: the loss counts this token when it is a
label), and PREFIX.json, the manifest written by the tokenizer.
"""

# n documents, t tokens

import json
import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.integer]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


class TokenFileError(ValueError):
    """A token file that cannot be read as what it claims to be; the message names the file."""


def prefix_of(path: str | os.PathLike[str]) -> str:
    """The common prefix of a token file's parts, from the prefix itself or the name of the .bin or the .idx."""
    text = os.fspath(path)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


def token_dtype(vocab_size: int) -> type[np.integer]:
    """The dtype megatron-core chooses for ids below `vocab_size`: uint16 where they fit, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


class TokenFile:
    """A token file opened for reading, in time and memory that do not grow with the corpus.

    Both files are read by position, not mapped: pages of a corpus never count as this process's memory, and a file that
    is cut while we read gives an error instead of SIGBUS. Documents of length 0 (other writers make them) have no
    position; their starts repeat that of the next document.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.prefix = prefix_of(path)
        bin_path, idx_path = f"{self.prefix}.bin", f"{self.prefix}.idx"
        self._idx = _open(idx_path)
        self.dtype, num_sequences, num_entries = _read_header(self._idx, idx_path)
        idx_bytes = _HEADER.size + 12 * num_sequences + 8 * num_entries
        got = os.fstat(self._idx.fileno()).st_size
        if got not in (idx_bytes, idx_bytes + num_sequences):  # the latter: one mode byte per sequence (multimodal)
            raise TokenFileError(
                f"{idx_path}: {got} bytes, needs {idx_bytes} for {num_sequences} sequences; tokenize it again"
            )
        self._bin = _open(bin_path)
        bin_bytes = os.fstat(self._bin.fileno()).st_size
        self.num_documents = num_entries - 1
        self._starts_offset = _HEADER.size + 4 * num_sequences
        wanted_bytes = 0
        if num_sequences:
            last_length = self._read_idx(self._starts_offset - 4, 1, np.int32)[0]
            last_start = self._read_idx(self._starts_offset + 8 * (num_sequences - 1), 1, np.int64)[0]
            wanted_bytes = int(last_start) + int(last_length) * self.dtype.itemsize
        if bin_bytes != wanted_bytes:
            raise TokenFileError(
                f"{bin_path}: {bin_bytes} bytes, needs {wanted_bytes} by its .idx; the file is cut short or belongs to "
                "another .idx: copy or tokenize it again"
            )
        self.num_tokens = bin_bytes // self.dtype.itemsize
        # Files of whole sentences (several sequences in a document) are rare and small: their starts are held in
        # memory.
        self._starts = None if num_sequences == self.num_documents else self._gather_starts(num_sequences)
        self._stride = max(1024, self.num_documents >> 13)
        self._mask = self._open_mask()
        self.manifest = self._read_manifest()

    @property
    def has_mask(self) -> bool:
        return self._mask is not None

    def document_starts(self, first: int, stop: int) -> np.ndarray:
        """First token of documents first..stop-1: int64. Document n, past the last, starts where the file ends."""
        if self._starts is not None:
            return self._starts[first:stop]
        inside = self._read_idx(self._starts_offset + 8 * first, min(stop, self.num_documents) - first, np.int64)
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

    @cached_property
    def _landmarks(self) -> np.ndarray:
        """The start of every stride-th document, at most some 10,000 of them: int64."""
        documents = range(0, max(1, self.num_documents), self._stride)
        return np.concatenate([self.document_starts(document, document + 1) for document in documents])

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (contiguous, this file's dtype) with the tokens from position `start` on."""
        _read_exactly(self._bin, start * self.dtype.itemsize, out, f"{self.prefix}.bin")

    def read_mask(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (contiguous uint8) with the loss mask from position `start` on."""
        assert self._mask is not None
        _read_exactly(self._mask, start, out, f"{self.prefix}.mask")

    def close(self) -> None:
        for stream in filter(None, (self._idx, self._bin, self._mask)):
            stream.close()

    def _read_idx(self, offset: int, count: int, dtype: type[np.integer]) -> np.ndarray:
        out = np.empty(count, dtype)
        _read_exactly(self._idx, offset, out, f"{self.prefix}.idx")
        return out

    def _gather_starts(self, num_sequences: int) -> np.ndarray:
        sequence_starts = self._read_idx(self._starts_offset, num_sequences, np.int64) // self.dtype.itemsize
        first_sequences = self._read_idx(self._starts_offset + 8 * num_sequences, self.num_documents + 1, np.int64)
        return np.append(sequence_starts, self.num_tokens)[first_sequences]

    def _open_mask(self) -> BinaryIO | None:
        path = f"{self.prefix}.mask"
        if not os.path.exists(path):
            return None
        got = os.path.getsize(path)
        if got != self.num_tokens:
            raise TokenFileError(
                f"{path}: {got} bytes, needs one for each of {self.num_tokens} tokens; tokenize it again"
            )
        return _open(path)

    def _read_manifest(self) -> dict[str, Any] | None:
        path = Path(f"{self.prefix}.json")
        if not path.exists():
            return None
        try:
            manifest = json.loads(path.read_text())
            tokens = manifest["tokens"]
        except (ValueError, KeyError, TypeError) as error:
            raise TokenFileError(
                f"{path}: not a manifest of a token file ({error!r}); delete it or tokenize again"
            ) from error
        if tokens != self.num_tokens:
            raise TokenFileError(
                f"{path}: speaks of {tokens} tokens, the .bin has {self.num_tokens}; tokenize it again"
            )
        return manifest


class TokenFileWriter:
    """Writes a token file so that it is there whole or not at all.

    All parts are written under temporary names in the target's folder, flushed to disk and renamed, the .idx last:
    without an .idx nothing reads a .bin. Use as a context manager; leaving it by an exception removes the temporary
    files.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: type[np.integer], *, with_mask: bool = False):
        self.prefix = prefix_of(prefix)
        self.dtype = np.dtype(dtype)
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._suffixes = [".bin", ".idx", ".json"] + [".mask"] * with_mask
        self._bin = open(self._temporary(".bin"), "wb", buffering=1 << 20)  # noqa: SIM115 - closed in __exit__
        self._mask = open(self._temporary(".mask"), "wb", buffering=1 << 20) if with_mask else None  # noqa: SIM115
        self._lengths: list[np.ndarray] = []
        self.manifest: dict[str, Any] = {}

    def __enter__(self) -> "TokenFileWriter":
        return self

    def add(self, tokens: np.ndarray, lengths: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append documents: their tokens one after the other [t], their lengths [n] and, with a mask, uint8 [t]."""
        self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.append(np.asarray(lengths, dtype=np.int32))
        if self._mask is not None:
            assert mask is not None and len(mask) == len(tokens)
            self._mask.write(np.ascontiguousarray(mask, dtype=np.uint8).data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            for stream in filter(None, (self._bin, self._mask)):
                with suppress(OSError):  # what could not be flushed has already been reported, by write or _publish
                    stream.close()
            for suffix in self._suffixes:
                Path(self._temporary(suffix)).unlink(missing_ok=True)

    def _publish(self) -> None:
        for stream in filter(None, (self._bin, self._mask)):
            _sync(stream)
        lengths = np.concatenate([np.empty(0, np.int32), *self._lengths])
        with open(self._temporary(".idx"), "wb") as idx:
            idx.writelines(_index_parts(lengths, self.dtype))
            _sync(idx)
        with open(self._temporary(".json"), "w") as manifest:
            json.dump(
                {"documents": len(lengths), "tokens": int(lengths.sum(dtype=np.int64)), **self.manifest},
                manifest,
                indent=1,
            )
            _sync(manifest)
        # An older file of this name stops being readable before its parts are replaced.
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        Path(f"{self.prefix}.mask").unlink(missing_ok=True)
        for suffix in sorted(self._suffixes, key=lambda suffix: suffix == ".idx"):
            os.replace(self._temporary(suffix), self.prefix + suffix)
        folder = os.open(Path(self.prefix).parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def _temporary(self, suffix: str) -> str:
        return f"{self.prefix}{suffix}.tmp-{os.getpid()}"


def _index_parts(lengths: np.ndarray, dtype: np.dtype) -> Iterable[Any]:
    """The .idx of one sequence per document, part by part."""
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    yield _HEADER.pack(_MAGIC, 1, _CODES[dtype], len(lengths), len(lengths) + 1)
    yield lengths.data
    yield (ends - lengths.astype(np.int64) * dtype.itemsize).data
    yield np.arange(len(lengths) + 1, dtype=np.int64).data


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


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise TokenFileError(f"{path}: no such file; a source's path is the prefix of a .bin and an .idx") from None


def _read_exactly(stream: BinaryIO, offset: int, out: np.ndarray, path: str) -> None:
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
            f"{path}: got {got} of {len(view)} bytes at {offset}; the file was cut while it was being read"
        )


def _sync(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
