"""Checkpoints of format version 1, for reading: torch's, whose index is a pickle, and a pickle can call anything.

torch and megatron-core keep where each tensor is in `.metadata`, a pickled torch Metadata. None of its objects is ever
built: every class it names becomes a record that does nothing, the records are checked, and an index of ours is made of
what they hold. That one is used from then on; nothing opens the file a second time.
"""

import io
import math
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_mcore.checkpoint.folder import CheckpointError
from prism_mcore.checkpoint.index import Index, Stored
from prism_mcore.checkpoint.places import Piece, Shape, check_whole

INDEX = ".metadata"

Places = dict[tuple[str, Shape], tuple[str, int, int]]  # (key, offsets): file, first byte, bytes


def read_old_index(path: Path) -> tuple[Index, Places]:
    """The index of a checkpoint's tensors, and where torch.save wrote each of their pieces.

    Raises CheckpointError, naming the file, for a pickle that names anything but the index's own classes, for objects
    that are not tensors, and for an index that does not hold together.
    """
    try:
        with open(path / INDEX, "rb") as file:
            return _rebuild(_Unpickler(file).load())
    except OSError as error:
        raise CheckpointError(f"{path / INDEX} cannot be read: {error}") from error
    except Exception as error:  # a damaged pickle fails in any way
        reason = str(error) if isinstance(error, _Refused) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path / INDEX} is not an index of tensors: {reason}") from error


class _Refused(pickle.UnpicklingError):
    """Something in the pickle that no index has."""


# --- the pickle -------------------------------------------------------------------------------------------------------


class _Record:
    """What stands for an object of the pickle: the state it was given, whatever its class was called with."""

    __slots__ = ("state",)
    state: Any

    def __new__(cls, *_: Any) -> "_Record":
        record = super().__new__(cls)
        record.state = None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Metadata(_Record): ...


class _MetadataIndex(_Record): ...


class _TensorStorageMetadata(_Record): ...


class _TensorProperties(_Record): ...


class _ChunkStorageMetadata(_Record): ...


class _StorageInfo_(_Record): ...


class _MemoryFormat(_Record): ...


class _Unused(_Record): ...


class _Member:
    """What stands for getattr, by which some versions of Python pickle the members of an enumeration."""

    __slots__ = ()
    NAMES = ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT")

    def __new__(cls, owner: Any, name: Any) -> Any:
        if isinstance(owner, type) and issubclass(owner, _MemoryFormat) and name in cls.NAMES:
            return owner(name)
        raise _Refused(f"it asks for the attribute {name!r} of {getattr(owner, '__name__', owner)!r}")


_METADATA = "torch.distributed.checkpoint.metadata"
_STANDS_FOR: dict[tuple[str, str], type] = {
    ("builtins", "getattr"): _Member,
    ("pathlib", "PosixPath"): _Unused,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo_,
    (_METADATA, "BytesStorageMetadata"): _Unused,
    (_METADATA, "ChunkStorageMetadata"): _ChunkStorageMetadata,
    (_METADATA, "Metadata"): _Metadata,
    (_METADATA, "MetadataIndex"): _MetadataIndex,
    (_METADATA, "StorageMeta"): _Unused,
    (_METADATA, "TensorProperties"): _TensorProperties,
    (_METADATA, "TensorStorageMetadata"): _TensorStorageMetadata,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _MemoryFormat,
    ("torch.serialization", "_get_layout"): _Unused,
}
# Types of the interpreter, which a pickle cannot change.
_PLAIN: dict[tuple[str, str], Any] = {("collections", "OrderedDict"): dict, ("torch", "Size"): tuple}
_PLAIN |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Unpickler(pickle.Unpickler):
    """Gives a pickle plain types, and classes of its own that do nothing: it can set attributes of what it is given."""

    def __init__(self, file: Any):
        super().__init__(file)
        self.classes = {named: type(named[1], (ours,), {"__slots__": ()}) for named, ours in _STANDS_FOR.items()}

    def find_class(self, module: str, name: str) -> Any:
        found = self.classes.get((module, name)) or _PLAIN.get((module, name))
        if found is None:
            raise _Refused(f"it names {module}.{name}")
        return found


# --- what it holds ----------------------------------------------------------------------------------------------------


def _rebuild(root: Any) -> tuple[Index, Places]:
    """An index of what the records hold, every part of it checked."""
    fields = _state(root, _Metadata, dict)
    entries = _typed(fields.get("state_dict_metadata"), dict)
    objects = [name for name, entry in entries.items() if not isinstance(entry, _TensorStorageMetadata)]
    if objects:
        raise _Refused(f"it lists pickled objects, which are never loaded: {objects[:3]}")
    places: Places = {}
    for key, place in _typed(fields.get("storage_data"), dict).items():
        named = _state(key, _MetadataIndex, dict)
        places[_typed(named.get("fqn"), str), _sizes(named.get("offset"))] = _place(place)
    return {_typed(name, str): _tensor(name, entry, places) for name, entry in entries.items()}, places


def _tensor(name: str, record: Any, places: Places) -> Stored:
    fields = _state(record, _TensorStorageMetadata, dict)
    properties = _state(fields.get("properties"), _TensorProperties, tuple)
    dtype, shape = _typed(properties[0] if properties else None, torch.dtype), _sizes(fields.get("size"))
    boxes = [_state(chunk, _ChunkStorageMetadata, dict) for chunk in _typed(fields.get("chunks"), list)]
    pieces = [Piece.of_box(name, shape, _sizes(box.get("offsets")), _sizes(box.get("sizes"))) for box in boxes]
    try:
        check_whole(pieces, shape)
    except ValueError as error:
        raise _Refused(f"{name}: {error}") from error
    if nowhere := [piece for piece in pieces if (name, piece.offsets) not in places]:
        raise _Refused(f"it does not say where {name} is from {list(nowhere[0].offsets)} on")
    return Stored(dtype, shape, {piece: places[name, piece.offsets][0] for piece in pieces})


def _place(record: Any) -> tuple[str, int, int]:
    fields = _state(record, _StorageInfo_, dict)
    file, start, length = _typed(fields.get("relative_path"), str), fields.get("offset"), fields.get("length")
    if Path(file).name != file or not file.endswith(".distcp"):
        raise _Refused(f"it names {file!r}; needed: a .distcp file beside it")
    if fields.get("transform_descriptors"):
        raise _Refused(f"what it says of {file} is transformed: {fields['transform_descriptors']!r}")
    start, length = _sizes((start, length))
    return file, start, length


def _state(record: Any, of: type, form: type) -> Any:
    return _typed(_typed(record, of).state, form)


def _typed(value: Any, of: type) -> Any:
    if not isinstance(value, of):
        raise _Refused(f"{type(value).__name__} stands where {of.__name__.strip('_')} belongs")
    return value


def _sizes(value: Any) -> Shape:
    numbers = _typed(value, tuple)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise _Refused(f"{numbers!r} stands where sizes belong")
    return tuple(numbers)


# --- a tensor's own entry ---------------------------------------------------------------------------------------------


def place_of(path: Path, piece: Piece, stored: Stored, places: Places, descriptor: int) -> int:
    """The byte of a file where a piece's numbers begin: torch.save wrote a zip of a small pickle and the data."""
    name, (file, start, length) = piece.key, places[piece.key, piece.offsets]
    window = _Window(descriptor, start, length)
    try:
        described = torch.load(window, map_location="meta", weights_only=True)  # reads the pickle, not the data
        with zipfile.ZipFile(window) as archive:
            (data,) = [item for item in archive.infolist() if item.filename.split("/", 1)[1] == "data/0"]
        window.seek(data.header_offset + 26)
        lengths = window.read(4)
    except Exception as error:  # a damaged zip, or pickle, fails in any way
        raise CheckpointError(f"{path / file}: cannot read {name}: {error}") from error
    plain = isinstance(described, Tensor) and described.is_contiguous() and described.storage_offset() == 0
    if not plain or (tuple(described.shape), described.dtype) != (piece.sizes, stored.dtype):
        raise CheckpointError(f"{path / file}: {name} is not the tensor that the index describes")
    if data.compress_type != zipfile.ZIP_STORED or data.file_size != math.prod(piece.sizes) * stored.dtype.itemsize:
        raise CheckpointError(f"{path / file}: the data of {name} has not the size of its shape")
    names = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return start + data.header_offset + 30 + names


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
