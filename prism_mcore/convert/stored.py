"""The tensors of a checkpoint on disk, row by row, without a process group and whatever layout wrote it."""

import contextlib
import io
import math
import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from prism_mcore.checkpoint.folder import CheckpointError
from prism_mcore.checkpoint.index import read_index
from prism_mcore.convert.names import ExchangeError, Run, Shape
from prism_mcore.convert.source import read_exactly


@dataclass(frozen=True)
class Piece:
    """A rectangle of a key, contiguous in a file."""

    file: str
    start: int  # byte of its first element
    offsets: Shape
    sizes: Shape


class StoredTensors(contextlib.ExitStack):
    """Rows of the tensors of a checkpoint, whatever layout wrote it. Its manifest must have been verified."""

    def __init__(self, path: Path, prefix: str = ""):
        super().__init__()
        self.path, self.prefix = path, prefix
        try:
            self.index = read_index(path)
        except (CheckpointError, OSError) as error:
            raise ExchangeError(str(error)) from error
        self.descriptors: dict[str, int] = {}
        self.pieces: dict[str, list[Piece]] = {}

    def shape(self, key: str) -> Shape:
        """Of the whole key; a vocabulary may be padded."""
        return tuple(self._entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """In which a key is stored."""
        return self._entry(key).properties.dtype

    def read(self, run: Run, out: Tensor) -> None:
        """Copy rows of a key into `out`, [rows, ...] of the key's dtype."""
        filled = 0
        for piece in self._pieces(run.key):
            first, last = max(run.start, piece.offsets[0]), min(run.start + run.rows, piece.offsets[0] + piece.sizes[0])
            if first >= last:
                continue
            target = out[first - run.start : last - run.start]
            if len(piece.sizes) > 1:
                target = target[:, piece.offsets[1] : piece.offsets[1] + piece.sizes[1]]
            row_bytes = math.prod(piece.sizes[1:]) * out.itemsize
            self._read_into(target, piece, piece.start + (first - piece.offsets[0]) * row_bytes)
            filled += target.numel()
        if filled != out.numel():
            raise ExchangeError(f"{self.path} does not hold all of {self.prefix}{run.key}: its index is damaged")

    def _read_into(self, target: Tensor, piece: Piece, start: int) -> None:
        whole = target if target.is_contiguous() else torch.empty(target.shape, dtype=target.dtype)
        read_exactly(self._descriptor(piece.file), start, whole, self.path / piece.file)
        if whole is not target:
            target.copy_(whole)

    def _entry(self, key: str) -> TensorStorageMetadata:
        try:
            return self.index.state_dict_metadata[self.prefix + key]
        except KeyError:
            what = "no fp32 masters" if self.prefix else "another model or no weights"
            raise ExchangeError(f"{self.path} has no {self.prefix}{key}: it holds {what}") from None

    def _pieces(self, key: str) -> list[Piece]:
        if key not in self.pieces:
            entry, name = self._entry(key), self.prefix + key
            infos = [self.index.storage_data[MetadataIndex(name, chunk.offsets)] for chunk in entry.chunks]
            self.pieces[key] = [
                self._piece(name, chunk, entry.properties.dtype, info)
                for chunk, info in zip(entry.chunks, infos, strict=True)
            ]
        return self.pieces[key]

    def _piece(self, name: str, chunk: ChunkStorageMetadata, dtype: torch.dtype, info: _StorageInfo) -> Piece:
        """Where the numbers of a chunk are in its file: torch.save wrote it, a zip of a small pickle and the data."""
        window = _Window(self._descriptor(info.relative_path), info.offset, info.length)
        try:
            described = torch.load(window, map_location="meta", weights_only=True)  # reads the pickle, not the data
            with zipfile.ZipFile(window) as archive:
                (data,) = [item for item in archive.infolist() if item.filename.split("/", 1)[1] == "data/0"]
            window.seek(data.header_offset + 26)
            lengths = window.read(4)
        except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError, OSError) as error:
            raise ExchangeError(f"{self.path / info.relative_path}: cannot read {name}: {error}") from error
        sizes = tuple(chunk.sizes)
        plain = isinstance(described, Tensor) and described.is_contiguous() and described.storage_offset() == 0
        if not plain or (tuple(described.shape), described.dtype) != (sizes, dtype):
            raise ExchangeError(f"{self.path / info.relative_path}: {name} is not the tensor that the index describes")
        if data.compress_type != zipfile.ZIP_STORED or data.file_size != math.prod(sizes) * dtype.itemsize:
            raise ExchangeError(f"{self.path / info.relative_path}: the data of {name} has not the size of its shape")
        names = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        return Piece(info.relative_path, info.offset + data.header_offset + 30 + names, tuple(chunk.offsets), sizes)

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
