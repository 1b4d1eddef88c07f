"""A checkpoint on disk, in one process: rows of its tensors read, whatever layout wrote them, and a new one written."""

import contextlib
import io
import itertools
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from prism_mcore.checkpoint.durable import FileRecord
from prism_mcore.checkpoint.files import HashedFile, Workers, as_bytes, read_exactly
from prism_mcore.checkpoint.folder import CheckpointError, complete, state_text
from prism_mcore.checkpoint.index import INDEX, read_index

Shape = tuple[int, ...]
MASTER = "optimizer.state.param."  # before a key: the optimizer's fp32 copy of it


@dataclass(frozen=True)
class _Chunk:
    """A rectangle of a key, contiguous in a file."""

    file: str
    start: int  # byte of its first element
    offsets: Shape
    sizes: Shape


class StoredTensors(contextlib.ExitStack):
    """Rows of the tensors of a checkpoint whose manifest was verified. Raises CheckpointError, naming the file.

    prefix: what is before each key in the index, such as MASTER.
    """

    def __init__(self, path: Path, prefix: str = ""):
        super().__init__()
        self.path, self.prefix = path, prefix
        self.index = read_index(path)
        self.descriptors: dict[str, int] = {}
        self.chunks: dict[str, list[_Chunk]] = {}

    def shape(self, key: str) -> Shape:
        """Of the whole key; a vocabulary may be padded."""
        return tuple(self._entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """In which a key is stored."""
        return self._entry(key).properties.dtype

    def read(self, key: str, start: int, out: Tensor) -> None:
        """Copy the rows of a key from `start` on into `out`, [rows, ...] of the key's dtype."""
        stop, filled = start + out.shape[0], 0
        for chunk in self._chunks(key):
            first, last = max(start, chunk.offsets[0]), min(stop, chunk.offsets[0] + chunk.sizes[0])
            if first >= last:
                continue
            target = out[first - start : last - start]
            if len(chunk.sizes) > 1:
                target = target[:, chunk.offsets[1] : chunk.offsets[1] + chunk.sizes[1]]
            row_bytes = math.prod(chunk.sizes[1:]) * out.itemsize
            self._read_into(target, chunk, chunk.start + (first - chunk.offsets[0]) * row_bytes)
            filled += target.numel()
        if filled != out.numel():
            raise CheckpointError(f"{self.path} does not hold all of {self.prefix}{key}: its index is damaged")

    def _read_into(self, target: Tensor, chunk: _Chunk, start: int) -> None:
        whole = target if target.is_contiguous() else torch.empty(target.shape, dtype=target.dtype)
        if not read_exactly(self._descriptor(chunk.file), start, whole):
            raise CheckpointError(f"{self.path / chunk.file} ends before byte {start + whole.nbytes}: it is truncated")
        if whole is not target:
            target.copy_(whole)

    def _entry(self, key: str) -> TensorStorageMetadata:
        try:
            return self.index.state_dict_metadata[self.prefix + key]
        except KeyError:
            what = "no fp32 masters" if self.prefix else "another model or no weights"
            raise CheckpointError(f"{self.path} has no {self.prefix}{key}: it holds {what}") from None

    def _chunks(self, key: str) -> list[_Chunk]:
        if key not in self.chunks:
            entry, name = self._entry(key), self.prefix + key
            infos = [self.index.storage_data[MetadataIndex(name, chunk.offsets)] for chunk in entry.chunks]
            self.chunks[key] = [
                self._chunk(name, chunk, entry.properties.dtype, info)
                for chunk, info in zip(entry.chunks, infos, strict=True)
            ]
        return self.chunks[key]

    def _chunk(self, name: str, chunk: ChunkStorageMetadata, dtype: torch.dtype, info: _StorageInfo) -> _Chunk:
        """Where the numbers of a chunk are in its file: torch.save wrote it, a zip of a small pickle and the data."""
        path = self.path / info.relative_path
        window = _Window(self._descriptor(info.relative_path), info.offset, info.length)
        try:
            described = torch.load(window, map_location="meta", weights_only=True)  # reads the pickle, not the data
            with zipfile.ZipFile(window) as archive:
                (data,) = [item for item in archive.infolist() if item.filename.split("/", 1)[1] == "data/0"]
            window.seek(data.header_offset + 26)
            lengths = window.read(4)
        except Exception as error:  # a damaged zip, or pickle, fails in any way
            raise CheckpointError(f"{path}: cannot read {name}: {error}") from error
        sizes = tuple(chunk.sizes)
        plain = isinstance(described, Tensor) and described.is_contiguous() and described.storage_offset() == 0
        if not plain or (tuple(described.shape), described.dtype) != (sizes, dtype):
            raise CheckpointError(f"{path}: {name} is not the tensor that the index describes")
        if data.compress_type != zipfile.ZIP_STORED or data.file_size != math.prod(sizes) * dtype.itemsize:
            raise CheckpointError(f"{path}: the data of {name} has not the size of its shape")
        names = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        return _Chunk(info.relative_path, info.offset + data.header_offset + 30 + names, tuple(chunk.offsets), sizes)

    def _descriptor(self, file: str) -> int:
        if file not in self.descriptors:
            descriptor = os.open(self.path / file, os.O_RDONLY)
            self.callback(os.close, descriptor)
            self.descriptors[file] = descriptor
        return self.descriptors[file]


class _Window(io.RawIOBase):
    """Part of an open file, as a file."""

    def __init__(self, descriptor: int, start: int, length: int):
        self.descriptor, self.start, self.length, self.place = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.length}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer)[: max(0, self.length - self.place)]
        count = os.preadv(self.descriptor, [wanted], self.start + self.place)
        self.place += count
        return count


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A part of a key that is written at once."""

    key: str
    shape: Shape  # of the whole key
    offsets: Shape
    sizes: Shape
    file: str


def write_weights(
    path: Path,
    pieces: Iterable[Piece],
    tensors: Iterator[Tensor],
    layout: dict[str, int],
    on_bytes: Callable[[int], None] = lambda size: None,
) -> None:
    """Write a checkpoint of weights alone, as after 0 steps, to a new folder.

    pieces: those of one file, `__<writer>_<number>.distcp`, one after the other; tensors: of each piece, contiguous,
    on the CPU, valid until the next is asked for. layout: of the ranks whose files these are like.
    """
    index = Metadata({}, storage_data={})
    records: dict[str, FileRecord] = {}
    path.mkdir()
    with Workers() as workers:
        for name, own in itertools.groupby(pieces, key=lambda piece: piece.file):
            with contextlib.closing(HashedFile(path / name, workers)) as file:
                for piece, tensor in zip(own, tensors, strict=False):
                    _write_piece(tensor, piece, file, index)
                    on_bytes(tensor.nbytes)
            records[name] = file.record
    (path / INDEX).write_bytes(pickle.dumps(index))
    complete(path, state_text(0, layout, 0, {}), records)


def _write_piece(tensor: Tensor, piece: Piece, file: HashedFile, index: Metadata) -> None:
    start = file.size
    # torch.save writes all of what a tensor is a view of: give it one of exactly this memory.
    exact = torch.frombuffer(as_bytes(tensor), dtype=tensor.dtype).view(tensor.shape)
    try:
        torch.save(exact, file)
    except RuntimeError as error:  # torch makes of a full disk an assertion about positions
        raise file.error or error from error
    offsets, sizes = torch.Size(piece.offsets), torch.Size(piece.sizes)
    entry = index.state_dict_metadata.setdefault(
        piece.key, TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(piece.shape), [])
    )
    entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
    index.storage_data[MetadataIndex(piece.key, offsets)] = _StorageInfo(piece.file, start, file.size - start)
