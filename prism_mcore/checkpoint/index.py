"""The index of a checkpoint's tensors: what each is, how it is cut, and which file holds which piece."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prism_mcore.checkpoint.folder import CheckpointError
from prism_mcore.checkpoint.places import Piece, Shape, check_whole
from prism_mcore.checkpoint.safetensors import DTYPE_NAMES, DTYPES, unambiguous

INDEX = "tensors.json"


@dataclass
class Stored:
    """A tensor: the file of each of its pieces."""

    dtype: torch.dtype
    shape: Shape
    files: dict[Piece, str]


Index = dict[str, Stored]


def index_of(written: Iterable[tuple[Piece, torch.dtype, str]]) -> Index:
    """The index over (piece, dtype, file). Raises ValueError where pieces do not make whole tensors."""
    index: Index = {}
    for piece, dtype, file in written:
        stored = index.setdefault(piece.key, Stored(dtype, piece.shape, {}))
        if (stored.dtype, stored.shape) != (dtype, piece.shape) or piece in stored.files:
            raise ValueError(f"{piece.name} is there twice, or as different tensors")
        stored.files[piece] = file
    _check(index)
    return index


def index_text(index: Index) -> str:
    """JSON: for each tensor dtype, shape and pieces, each [file, offsets, sizes, start, stop]."""
    tensors = {
        key: {
            "dtype": DTYPE_NAMES[stored.dtype],
            "shape": stored.shape,
            "pieces": [(file, p.offsets, p.sizes, p.start, p.stop) for p, file in stored.files.items()],
        }
        for key, stored in sorted(index.items())
    }
    lines = (f"{json.dumps(key)}: {json.dumps(tensor)}" for key, tensor in tensors.items())
    return "{" + ",\n".join(lines) + "}\n"


def read_index(path: Path) -> Index:
    """The checked index of a checkpoint's folder. Raises CheckpointError, naming the file, for anything else."""
    file = path / INDEX
    try:
        raw = json.loads(file.read_bytes().decode(), object_pairs_hook=unambiguous)
        index = {key: _stored(key, described) for key, described in raw.items()}
        _check(index)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError else repr(error)
        raise CheckpointError(f"{file} is not an index of tensors: {reason}") from error
    return index


def _stored(key: str, described: dict[str, Any]) -> Stored:
    shape, files = _numbers(described["shape"]), {}
    for file, offsets, sizes, start, stop in described["pieces"]:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"it names {file!r} for {key}; needed: a safetensors file beside it")
        piece = Piece(key, shape, _numbers(offsets), _numbers(sizes), *_numbers([start, stop]))
        if piece in files:
            raise ValueError(f"{piece.name} is there twice")
        files[piece] = file
    if described["dtype"] not in DTYPES:
        raise ValueError(f"{key} is {described['dtype']!r}; needed: one of {', '.join(DTYPES)}")
    return Stored(DTYPES[described["dtype"]], shape, files)


def _check(index: Index) -> None:
    for key, stored in index.items():
        try:
            if not stored.shape or math.prod(stored.shape) == 0:
                raise ValueError("it has no elements or no axes")
            check_whole(stored.files, stored.shape)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error


def _numbers(value: Any) -> Shape:
    if not isinstance(value, list) or not all(type(number) is int and 0 <= number < 2**53 for number in value):
        raise ValueError(f"{value!r:.80} stands where sizes belong")
    return tuple(value)
