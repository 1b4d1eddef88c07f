"""The safetensors format: a header of JSON that says where in the file each tensor is, and their bytes."""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit

Shape = tuple[int, ...]


class NotSafetensors(ValueError):
    """A file is not what the format asks for; the message names it."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard."""

    dtype: str  # "BF16", "F16" or "F32"
    shape: Shape
    start: int  # bytes, after the header
    end: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header as it is on the disk, and what that says."""

    header: str  # JSON, padded with spaces
    entries: dict[str, Entry] = field(compare=False)  # in the order of their bytes

    @property
    def data_start(self) -> int:
        """Where in the file the bytes of the first tensor begin."""
        return 8 + len(self.header.encode())

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.data_start + max((entry.end for entry in self.entries.values()), default=0)


def unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that says nothing twice: readers differ in which they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return found


def parse_header(header: str, file: Path, dtypes: Collection[str] = DTYPES) -> dict[str, Entry]:
    """The tensors of a safetensors header in the order of their bytes; `file` is what messages call it."""
    try:
        raw = json.loads(header, object_pairs_hook=unambiguous)
        described = {name: value for name, value in raw.items() if name != "__metadata__"}
        entries = {
            name: _entry(value) for name, value in sorted(described.items(), key=lambda item: item[1]["data_offsets"])
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NotSafetensors(f"{file} is not a safetensors file: its header cannot be read ({error!r})") from error
    end = 0
    for name, entry in entries.items():
        if entry.dtype not in dtypes:
            raise NotSafetensors(f"{file}: {name} is {entry.dtype}; only {', '.join(dtypes)} can be read")
        if entry.start != end or entry.end - entry.start != math.prod(entry.shape) * entry.torch_dtype.itemsize:
            raise NotSafetensors(f"{file}: the bytes of {name} are not where they should be: the header is damaged")
        end = entry.end
    return entries


def _entry(described: dict[str, Any]) -> Entry:
    shape, (start, end) = described["shape"], described["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"the shape {shape} and the place {[start, end]} are not whole numbers")
    return Entry(described["dtype"], tuple(shape), start, end)


def read_shard(path: Path, dtypes: Collection[str] = DTYPES) -> Shard:
    """A file's header, checked against its size; nothing else is read."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise NotSafetensors(f"{path} is truncated or not a safetensors file: {size} bytes do not hold its header")
        header = file.read(length)
    try:
        text = header.decode()
    except UnicodeDecodeError as error:
        raise NotSafetensors(f"{path} is not a safetensors file: its header is not text") from error
    shard = Shard(text, parse_header(text, path, dtypes))
    if shard.size != size:
        cut = [name for name, entry in shard.entries.items() if 8 + length + entry.end > size]
        what = f"truncated: {some(cut)} cut off" if cut else "damaged: too long"
        raise NotSafetensors(f"{path} has {size} bytes, its header needs {shard.size}; it is {what}")
    return shard


def make_shard(
    tensors: dict[str, tuple[torch.dtype, Shape]], file: str, metadata: dict[str, str] | None = None
) -> Shard:
    """A shard of these tensors, (dtype, shape) by name, one after the other."""
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    text += " " * (-len(text.encode()) % 8)  # data starts at a multiple of 8
    return Shard(text, parse_header(text, Path(file)))


def some(names: list[str]) -> str:
    """The first of several names and how many there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
