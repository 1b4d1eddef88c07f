"""Tensors in a checkpoint's folder: files of pieces written, and any part of a tensor read from them."""

import contextlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from prism_mcore.checkpoint.durable import FileRecord
from prism_mcore.checkpoint.files import BLOCK_BYTES, HashedFile, OnBytes, Workers, as_bytes, read_exactly
from prism_mcore.checkpoint.folder import CheckpointError, complete, read_state, state_text
from prism_mcore.checkpoint.index import INDEX, Stored, index_of, index_text, read_index
from prism_mcore.checkpoint.old_format import Places, place_of, read_old_index
from prism_mcore.checkpoint.places import Box, Piece, Shape, common
from prism_mcore.checkpoint.safetensors import NotSafetensors, make_shard, read_shard

MASTER = "optimizer.state.param."  # before a key: the optimizer's fp32 copy of it
LEAST_RUN_BYTES = 4096  # below this, reading on over what lies between costs less: disks read pages


def write_pieces(
    path: Path,
    pieces: list[tuple[Piece, torch.dtype]],
    tensors: Iterable[Tensor],
    workers: Workers,
    on_bytes: OnBytes = lambda size: None,
) -> FileRecord:
    """Write one file; its size and SHA-256. Memory beside the tensors: some blocks of 8 MiB.

    tensors: of each piece, contiguous, valid until the next is asked for; from a GPU they come block by block.
    """
    header = make_shard({piece.name: (dtype, piece.form) for piece, dtype in pieces}, path.name).header.encode()
    with contextlib.closing(HashedFile(path, workers)) as file:
        file.append(len(header).to_bytes(8, "little") + header)
        for (piece, _), tensor in zip(pieces, tensors, strict=False):
            flat = tensor.detach().view(-1)
            assert len(flat) == piece.count
            for block in flat.split(BLOCK_BYTES // flat.itemsize):
                file.append(as_bytes(block.cpu()))
            on_bytes(tensor.nbytes)
    return file.record


def write_weights(
    path: Path,
    pieces: Iterable[tuple[Piece, torch.dtype, str]],
    tensors: Iterator[Tensor],
    layout: dict[str, int],
    on_bytes: OnBytes = lambda size: None,
) -> None:
    """Write a checkpoint of weights alone, as after 0 steps, to a new folder.

    pieces: with their dtype and file, those of one file one after the other; tensors: of each piece, contiguous, on
    the CPU, valid until the next is asked for. layout: of the ranks whose files these are like.
    """
    written = list(pieces)
    path.mkdir()
    records: dict[str, FileRecord] = {}
    with Workers() as workers:
        for file, own in itertools.groupby(written, key=lambda each: each[2]):
            described = [(piece, dtype) for piece, dtype, _ in own]
            records[file] = write_pieces(path / file, described, tensors, workers, on_bytes)
    (path / INDEX).write_text(index_text(index_of(written)), encoding="utf-8")
    complete(path, state_text(0, layout, 0, {}), records)


class StoredTensors(contextlib.ExitStack):
    """Parts of the tensors of a checkpoint whose manifest was verified. Raises CheckpointError, naming the file.

    prefix: what is before each key in the index, such as MASTER. on_read: told of every read's bytes.
    """

    def __init__(self, path: Path, prefix: str = "", on_read: OnBytes = lambda size: None):
        super().__init__()
        self.path, self.prefix, self.on_read = path, prefix, on_read
        self.descriptors: dict[str, int] = {}
        self.headers: dict[str, dict[str, tuple[torch.dtype, Shape, int]]] = {}  # file: name: dtype, shape, byte
        self.boxes: dict[str, list[tuple[Box, Piece, str]]] = {}
        self.starts: dict[Piece, int] = {}  # the byte of its file where each begins
        self.old_places: Places = {}
        if read_state(path)["format_version"] == 1:
            self.index, self.old_places = read_old_index(path)
        else:
            self.index = read_index(path)

    def __contains__(self, key: str) -> bool:
        return self._name(key) in self.index

    def master(self, key: str) -> str:
        """What the fp32 master of a weight is called; an fp32 weight is its own, and stored once."""
        own = MASTER + key not in self.index and key in self.index and self.index[key].dtype == torch.float32
        return key if own else MASTER + key

    def _name(self, key: str) -> str:
        return self.master(key) if self.prefix == MASTER else self.prefix + key

    def shape(self, key: str) -> Shape:
        """Of the whole key; a vocabulary may be padded."""
        return self._entry(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """In which a key is stored."""
        return self._entry(key).dtype

    def read(self, key: str, start: int, out: Tensor) -> None:
        """Copy the rows of a key from `start` on into `out`, [rows, ...]."""
        offsets = (start, *(0 for _ in out.shape[1:]))
        self.read_piece(Piece.of_box(key, self.shape(key), offsets, tuple(out.shape)), out)

    @torch.no_grad()
    def read_piece(self, piece: Piece, out: Tensor) -> None:
        """Fill `out`, contiguous, of any dtype and device, with a piece of a key, cut as it may be; no more is read.

        Elements that the stored tensor does not have, which are those of a vocabulary's padding, become 0.
        """
        entry, flat, filled, missing = self._entry(piece.key), out.view(-1), 0, 0
        stored = self._boxes(piece.key)
        for wanted in piece.boxes():
            target = flat[wanted.first : wanted.first + math.prod(wanted.sizes)].view(wanted.sizes)
            inside = common(wanted, Box(tuple(0 for _ in entry.shape), entry.shape, 0))
            if inside is None or inside[1] != wanted.sizes:
                target.zero_()
                missing += target.numel() - (math.prod(inside[1]) if inside else 0)
            for box, source, file in stored:
                if shared := common(wanted, box):
                    offsets, sizes = shared
                    part = target
                    for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                        part = part.narrow(axis, offset - wanted.offsets[axis], size)
                    begin = tuple(o - b for o, b in zip(offsets, box.offsets, strict=True))
                    byte = self._start(source, file) + box.first * entry.dtype.itemsize
                    self._copy(file, byte, box.sizes, begin, part, entry.dtype)
                    filled += part.numel()
        if filled + missing != piece.count:
            raise CheckpointError(f"{self.path} does not hold all of {self.prefix}{piece.key}: its index is damaged")

    def _copy(self, file: str, byte: int, sizes: Shape, begin: Shape, target: Tensor, dtype: torch.dtype) -> None:
        """Fill `target` from the box of these sizes that starts at a byte of a file, from `begin` in it on."""
        row = math.prod(sizes[1:]) * dtype.itemsize
        if target.shape[1:] == sizes[1:]:
            self._read_into(target, file, byte + begin[0] * row, dtype)
        elif len(target) == 1 or target[0].nbytes >= LEAST_RUN_BYTES:
            for number, part in enumerate(target):
                self._copy(file, byte + (begin[0] + number) * row, sizes[1:], begin[1:], part, dtype)
        else:
            rows = max(1, BLOCK_BYTES // row)
            for number, part in enumerate(target.split(rows)):
                whole = torch.empty((len(part), *sizes[1:]), dtype=dtype)
                self._read_into(whole, file, byte + (begin[0] + number * rows) * row, dtype)
                for axis, (start, size) in enumerate(zip(begin[1:], part.shape[1:], strict=True), start=1):
                    whole = whole.narrow(axis, start, size)
                part.copy_(whole)

    def _read_into(self, target: Tensor, file: str, byte: int, dtype: torch.dtype) -> None:
        if target.is_contiguous() and target.dtype == dtype and target.device.type == "cpu":
            self.on_read(target.nbytes)
            if not read_exactly(self._descriptor(file), byte, target):
                raise CheckpointError(f"{self.path / file} ends before byte {byte + target.nbytes}: it is truncated")
            return
        rows = max(1, BLOCK_BYTES // (math.prod(target.shape[1:]) * dtype.itemsize))
        for part in target.split(rows):
            whole = torch.empty(part.shape, dtype=dtype)
            self._read_into(whole, file, byte, dtype)
            part.copy_(whole)
            byte += whole.nbytes

    def _entry(self, key: str) -> Stored:
        try:
            return self.index[self._name(key)]
        except KeyError:
            what = "no fp32 masters" if self.prefix else "another model or no weights"
            raise CheckpointError(f"{self.path} has no {self.prefix}{key}: it holds {what}") from None

    def _boxes(self, key: str) -> list[tuple[Box, Piece, str]]:
        if key not in self.boxes:
            files = self._entry(key).files
            self.boxes[key] = [(box, piece, file) for piece, file in files.items() for box in piece.boxes()]
        return self.boxes[key]

    def _start(self, piece: Piece, file: str) -> int:
        if piece not in self.starts:
            if self.old_places:
                stored = self.index[piece.key]
                self.starts[piece] = place_of(self.path, piece, stored, self.old_places, self._descriptor(file))
            else:
                self.starts[piece] = self._start_in_file(piece, file)
        return self.starts[piece]

    def _start_in_file(self, piece: Piece, file: str) -> int:
        """The byte of a file where a piece begins, by the file's own header, which must agree with the index."""
        if file not in self.headers:
            try:
                shard = read_shard(self.path / file)
            except (NotSafetensors, OSError) as error:
                raise CheckpointError(f"{self.path / file} cannot be read: {error}") from error
            self.headers[file] = {
                name: (entry.torch_dtype, entry.shape, shard.data_start + entry.start)
                for name, entry in shard.entries.items()
            }
        dtype, shape, start = self.headers[file].get(piece.name, (None, None, 0))
        if (dtype, shape) != (self.index[piece.key].dtype, piece.form):
            found = "not there" if shape is None else f"{dtype} {list(shape)}"
            needed = f"{self.index[piece.key].dtype} {list(piece.form)}"
            raise CheckpointError(f"{self.path / file}: {piece.name} is {found}; the index says {needed}")
        return start

    def _descriptor(self, file: str) -> int:
        if file not in self.descriptors:
            try:
                self.descriptors[file] = os.open(self.path / file, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{self.path / file} cannot be read: {error}") from error
            self.callback(os.close, self.descriptors[file])
        return self.descriptors[file]
