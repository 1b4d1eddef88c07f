"""Documents as they arrive: JSONL (plain, .gz, .zst) and parquet files of texts or chats."""

import glob
import gzip
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from prism_mcore.text import render_chat

_CHUNK_BYTES = 1 << 20


class CorpusError(ValueError):
    """An input file that cannot be read as documents; the message names the file and the line."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive raw records of one file: lines of a JSONL file, or rows of a parquet file."""

    path: str
    first: int  # number of the first record, from 1 as editors count lines
    records: list[bytes] | list[dict[str, Any]]


@dataclass(frozen=True)
class Document:
    """One text and the pieces of it that a loss should count: the whole text, or the assistant's words in a chat."""

    text: str
    answers: list[tuple[int, int]]  # [start, end) in characters


def expand(inputs: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Files and glob patterns, in the order given, the matches of a pattern sorted. An input without a file is an
    error.
    """
    paths = []
    for item in (os.fspath(item) for item in inputs):
        found = [item] if os.path.isfile(item) else sorted(glob.glob(item, recursive=True))
        if not found:
            raise CorpusError(f"{item}: no such file")
        paths += found
    return paths


def read_chunks(path: str, text_key: str, on_bytes: Callable[[int], None] = lambda _: None) -> Iterator[Chunk]:
    """A file in chunks of about 1 MiB; `on_bytes` hears the position reached in the file as it lies on disk."""
    if path.endswith(".parquet"):
        yield from _read_parquet(path, text_key, on_bytes)
        return
    with open(path, "rb") as raw:
        try:
            yield from _read_lines(path, raw, _decompressed(path, raw), on_bytes)
        except (OSError, EOFError) as error:  # gzip.BadGzipFile is an OSError
            raise CorpusError(f"{path}: cannot be decompressed: {error}") from error
    on_bytes(os.path.getsize(path))


def documents(chunk: Chunk, text_key: str) -> Iterator[Document]:
    """The documents of a chunk, empty ones included. Raises CorpusError naming the file and the line."""
    unit = "row" if chunk.path.endswith(".parquet") else "line"
    for number, record in enumerate(chunk.records, start=chunk.first):
        try:
            yield parse(json.loads(record.strip()) if isinstance(record, bytes) else record, text_key)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{chunk.path}, line {number}: not JSON: {error.msg} at column {error.colno}") from error
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            raise CorpusError(f"{chunk.path}, {unit} {number}: {error}") from error


def parse(record: Any, text_key: str) -> Document:
    """One record: {text_key: str}, or {"messages": [{"role", "content"}, ...]}."""
    if not isinstance(record, dict):
        raise ValueError(f"got a JSON {type(record).__name__}, needs an object with {text_key!r} or 'messages'")
    if record.get("messages") is not None:
        chat = render_chat(record["messages"])
        return Document(chat.text, chat.answers)
    text = record.get(text_key)
    if not isinstance(text, str):
        raise ValueError(f"no text under {text_key!r} and no 'messages'; the record has {sorted(record)}")
    return Document(text, [(0, len(text))])


def _decompressed(path: str, raw: BinaryIO) -> BinaryIO:
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)
    if path.endswith(".zst"):
        import zstandard

        return io.BufferedReader(_ZstdStream(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)))
    return raw


class _ZstdStream(io.RawIOBase):
    """zstandard's reader with its own exception turned into OSError, as gzip reports damage."""

    def __init__(self, reader: Any):
        self._reader = reader

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        try:
            return self._reader.readinto(buffer)
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error


def _read_lines(path: str, raw: BinaryIO, stream: BinaryIO, on_bytes: Callable[[int], None]) -> Iterator[Chunk]:
    first = 1
    while lines := stream.readlines(_CHUNK_BYTES):
        yield Chunk(path, first, lines)
        first += len(lines)
        on_bytes(raw.tell())


def _read_parquet(path: str, text_key: str, on_bytes: Callable[[int], None]) -> Iterator[Chunk]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise CorpusError(f"{path}: not a parquet file: {error}") from error
    columns = [name for name in ("messages", text_key) if name in file.schema_arrow.names]
    if not columns:
        raise CorpusError(f"{path}: no column {text_key!r} or 'messages'; it has {file.schema_arrow.names}")
    first, size = 1, os.path.getsize(path)
    for batch in file.iter_batches(batch_size=1024, columns=columns):
        rows = batch.to_pylist()
        yield Chunk(path, first, rows)
        first += len(rows)
        on_bytes(size * (first - 1) // max(1, file.metadata.num_rows))
