"""Megatron's token files: PREFIX.bin (token ids, document after document) and PREFIX.idx (where documents start).

Two more files may stand beside them: PREFIX.mask, one uint8 per token of the .bin (1: the loss counts this token when
it is a label), and PREFIX.json, the manifest written by the tokenizer (data/tokenizing.py says what it holds).
"""

# n documents, t tokens

import hashlib
import json
import os
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from prism_mcore.data.token_index import TokenFileError, TokenIndex, index_parts, open_part, read_exactly

__all__ = ["TokenFile", "TokenFileError", "TokenFileWriter", "narrowed", "prefix_of", "token_dtype"]

_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of a .bin, for its identity


def prefix_of(path: str | os.PathLike[str]) -> str:
    """The common prefix of a token file's parts, from the prefix itself or the name of the .bin or the .idx."""
    text = os.fspath(path)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


def token_dtype(size: int) -> type[np.integer]:
    """The dtype megatron-core chooses for ids below `size`, the largest id + 1: uint16 where they fit, else int32."""
    return np.uint16 if size < 65500 else np.int32


def narrowed(values: Any, dtype: np.dtype | type[np.integer]) -> np.ndarray:
    """The same numbers in another dtype, contiguous; ValueError where one does not fit, instead of another number."""
    values = np.asarray(values)
    with np.errstate(invalid="ignore"):
        out = np.ascontiguousarray(values, dtype=dtype)
    if not np.can_cast(values.dtype, out.dtype):
        wrong = out != values
        if wrong.any():
            raise ValueError(
                f"{values.reshape(-1)[wrong.reshape(-1).argmax()]} does not fit {out.dtype}; needed: a dtype for the"
                " largest token id + 1"
            )
    return out


class TokenFile:
    """A token file opened for reading, in memory that does not grow with the corpus (see TokenIndex).

    Both files are read by position, not mapped: pages of a corpus never count as this process's memory, and a file that
    is truncated while we read gives an error instead of SIGBUS. Positions count the tokens that the .idx lists.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.prefix = prefix_of(path)
        self.index = TokenIndex(f"{self.prefix}.idx")
        self.dtype, self.num_documents, self.num_tokens = (
            self.index.dtype,
            self.index.num_documents,
            self.index.num_tokens,
        )
        self._bin = open_part(f"{self.prefix}.bin")
        bin_bytes = os.fstat(self._bin.fileno()).st_size
        self.index.check_bin(bin_bytes, f"{self.prefix}.bin")
        self._mask = self._open_mask(bin_bytes // self.dtype.itemsize)
        self.manifest = self._read_manifest()
        self.document_starts, self.starts_between = self.index.document_starts, self.index.starts_between
        self.documents_until = self.index.documents_until

    @property
    def has_mask(self) -> bool:
        return self._mask is not None

    @cached_property
    def identity(self) -> str:
        """Of the .idx, of 64 pieces of 4 KiB of the .bin and the mask, and, where the manifest has it, content_sha256.

        Two files that differ have different identities, but for tokens between the pieces of files without a manifest.
        """
        digest = hashlib.sha256()
        with open(f"{self.prefix}.idx", "rb") as idx:
            digest.update(hashlib.file_digest(idx, "sha256").digest())
        for stream in filter(None, (self._bin, self._mask)):
            last = max(0, os.fstat(stream.fileno()).st_size - _SAMPLE_BYTES)
            for place in np.linspace(0, last, _SAMPLES, dtype=np.int64).tolist():
                digest.update(os.pread(stream.fileno(), _SAMPLE_BYTES, place))
        digest.update((self.manifest or {}).get("content_sha256", "").encode())
        return digest.hexdigest()

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (contiguous, this file's dtype) with the tokens from position `start` on."""
        for place, first, stop in self.index.pieces(start, len(out)):
            read_exactly(self._bin, place * self.dtype.itemsize, out[first:stop], f"{self.prefix}.bin")

    def read_mask(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (contiguous uint8) with the loss mask from position `start` on."""
        assert self._mask is not None
        for place, first, stop in self.index.pieces(start, len(out)):
            read_exactly(self._mask, place, out[first:stop], f"{self.prefix}.mask")

    def close(self) -> None:
        self.index.close()
        for stream in filter(None, (self._bin, self._mask)):
            stream.close()

    def _open_mask(self, num_tokens: int) -> BinaryIO | None:
        path = f"{self.prefix}.mask"
        if not os.path.exists(path):
            return None
        got = os.path.getsize(path)
        if got != num_tokens:
            raise TokenFileError(f"{path}: {got} bytes, needs one for each of {num_tokens} tokens; tokenize it again")
        return open_part(path)

    def _read_manifest(self) -> dict[str, Any] | None:
        path = Path(f"{self.prefix}.json")
        if not path.exists():
            return None
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            tokens = manifest["tokens"]
            for name, kind in _MANIFEST_TYPES.items():
                if name in manifest and type(manifest[name]) is not kind:
                    raise TypeError(f"{name} is {manifest[name]!r:.80}, needs {kind.__name__}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise TokenFileError(
                f"{path}: not a manifest of a token file ({error!r}); delete it or tokenize again"
            ) from error
        if tokens != self.num_tokens:
            raise TokenFileError(
                f"{path}: speaks of {tokens} tokens, the .idx of {self.num_tokens}; tokenize it again, or delete the"
                " manifest of a file that was changed on purpose"
            )
        return manifest


_MANIFEST_TYPES = {
    "tokens": int,
    "max_token_id": int,
    "max_token_document": int,
    "tokenizer_sha256": str,
    "content_sha256": str,
}


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
        self._bin.write(narrowed(tokens, self.dtype).data)
        self._lengths.append(narrowed(lengths, np.int32))
        if self._mask is not None:
            assert mask is not None and len(mask) == len(tokens)
            self._mask.write(narrowed(mask, np.uint8).data)

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
            idx.writelines(index_parts(lengths, self.dtype))
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


def _sync(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
