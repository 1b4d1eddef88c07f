"""Documents as they arrive: JSONL (plain, .gz, .zst) and parquet files of texts or chats.

A file is read to its end or refused: one that is truncated or damaged, or a record that is no document, is an error
with the file and the line. Blank lines, a byte order mark and CRLF are read past, as by every reader.
"""

import codecs
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from prism_mcore.text import check_text, render_chat

_CHUNK_BYTES = 1 << 20
_PIECE_BYTES = 1 << 16  # of a .zst: what it may decompress to at once is a few MB, not the file


class CorpusError(ValueError):
    """An input file that cannot be read as documents; the message names the file and the line."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive raw records of one file: lines of a JSONL file, or rows of a parquet file."""

    path: str
    first: int  # number of the first record, from 1 as editors count lines
    records: list[bytes] | list[dict[str, Any]]

    @property
    def num_blank(self) -> int:
        """Lines that hold nothing."""
        return sum(isinstance(record, bytes) and not record.strip() for record in self.records)


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
        if os.path.isdir(item):
            raise CorpusError(f"{item}: a directory; give its files, for instance '{os.path.join(item, '*.jsonl')}'")
        found = [item] if os.path.isfile(item) else sorted(filter(os.path.isfile, glob.glob(item, recursive=True)))
        if not found:
            raise CorpusError(f"{item}: no such file")
        paths += found
    return paths


def read_chunks(path: str, text_key: str, on_bytes: Callable[[int], None] = lambda _: None) -> Iterator[Chunk]:
    """A file in chunks of about 1 MiB; `on_bytes` hears the position reached in the file as it lies on disk.

    Raises CorpusError, naming the file and how far it was read, where it is truncated or damaged.
    """
    reader = _read_parquet if path.endswith(".parquet") else _read_lines
    yield from reader(path, text_key, on_bytes)
    on_bytes(os.path.getsize(path))


def documents(chunk: Chunk, text_key: str) -> Iterator[Document]:
    """The documents of a chunk, empty ones included. Raises CorpusError naming the file and the line."""
    unit = "row" if chunk.path.endswith(".parquet") else "line"
    for number, record in enumerate(chunk.records, start=chunk.first):
        try:
            if not isinstance(record, bytes):
                yield parse(record, text_key)
            elif line := record.strip():
                yield parse(_load(line, text_key), text_key)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{chunk.path}, line {number}: not JSON: {error.msg} at column {error.colno}") from error
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            raise CorpusError(f"{chunk.path}, {unit} {number}: {error}") from error


def parse(record: Any, text_key: str) -> Document:
    """One record: {"messages": [{"role", "content"}, ...]}, or, where that holds nothing, {text_key: str}."""
    if not isinstance(record, dict):
        raise ValueError(f"got a JSON {type(record).__name__}, needs an object with {text_key!r} or 'messages'")
    messages, text = record.get("messages"), record.get(text_key)
    if messages or (messages is not None and not isinstance(text, str)):
        chat = render_chat(messages)
        return Document(check_text(chat.text), chat.answers)
    if not isinstance(text, str):
        held = f" (it is a {type(text).__name__})" if text is not None else ""
        raise ValueError(f"no text under {text_key!r}{held} and no 'messages'; the record has {sorted(record)}")
    return Document(check_text(text), [(0, len(text))])


def _load(line: bytes, text_key: str) -> Any:
    """The JSON of a line. A key that says what the document is and stands there twice has two readings: an error."""

    def one_of_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            keys = [key for key, _ in pairs]
            for key in (text_key, "messages", "role", "content"):
                if keys.count(key) > 1:
                    raise ValueError(f"{key!r} stands {keys.count(key)} times in one object; leave one")
        return record

    return json.loads(line.decode(), object_pairs_hook=one_of_each)


def _read_lines(path: str, text_key: str, on_bytes: Callable[[int], None]) -> Iterator[Chunk]:
    first = 1
    with open(path, "rb") as raw:
        stream = _decompressed(path, raw)
        while True:
            try:
                lines = stream.readlines(_CHUNK_BYTES)
            except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
                raise CorpusError(
                    f"{path}: cannot be decompressed: {error}; {first - 1} lines and {raw.tell()} of"
                    f" {os.path.getsize(path)} bytes were read before; get the file again"
                ) from error
            if not lines:
                return
            if first == 1:
                lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
            yield Chunk(path, first, lines)
            first += len(lines)
            on_bytes(raw.tell())


def _decompressed(path: str, raw: BinaryIO) -> BinaryIO:
    packed = path.endswith((".gz", ".zst"))
    if packed and not os.path.getsize(path):
        raise CorpusError(f"{path}: cannot be decompressed: 0 bytes, not even a header; get the file again")
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)
    return io.BufferedReader(_ZstdStream(raw), 1 << 20) if packed else raw


class _ZstdStream(io.RawIOBase):
    """What zstd frames hold, one after the other. A last frame without its end is an OSError, as damage is."""

    def __init__(self, raw: BinaryIO):
        import zstandard

        self._raw, self._error = raw, zstandard.ZstdError
        self._frames = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # as zstd --long=31 writes them
        self._frame: Any = None  # the one that has begun and not ended
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            piece = self._raw.read(_PIECE_BYTES)
            if not piece and self._frame is not None:
                raise OSError("it ends in the middle of a zstd frame")
            if not piece:
                return 0
            self._ready = memoryview(b"".join(self._decompress(piece)))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _decompress(self, piece: bytes) -> Iterator[bytes]:
        while piece:
            self._frame = self._frame or self._frames.decompressobj()
            try:
                yield self._frame.decompress(piece)
            except self._error as error:
                raise OSError(str(error)) from error
            if not self._frame.eof:
                return
            piece, self._frame = self._frame.unused_data, None


def _read_parquet(path: str, text_key: str, on_bytes: Callable[[int], None]) -> Iterator[Chunk]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{path}: not a parquet file: {error}") from error
    names = file.schema_arrow.names
    columns = [name for name in ("messages", text_key) if name in names]
    if not columns:
        raise CorpusError(f"{path}: no column {text_key!r} or 'messages'; it has {names}")
    if doubled := [name for name in columns if names.count(name) > 1]:
        raise CorpusError(f"{path}: {names.count(doubled[0])} columns are called {doubled[0]!r}; leave one")
    first, size, num_rows = 1, os.path.getsize(path), file.metadata.num_rows
    batches = file.iter_batches(batch_size=1024, columns=columns)
    while True:
        try:
            batch = next(batches, None)
            rows = [] if batch is None else batch.to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
            raise CorpusError(
                f"{path}: damaged after row {first - 1} of {num_rows}: {error}; get the file again"
            ) from error
        if batch is None:
            break
        yield Chunk(path, first, rows)
        first += len(rows)
        on_bytes(size * (first - 1) // max(1, num_rows))
    if first - 1 != num_rows:
        raise CorpusError(f"{path}: {first - 1} rows where its footer says {num_rows}; get the file again")
