"""The index of a checkpoint's tensors, read as data: it is a pickle, and a pickle can call anything.

torch and megatron-core keep where each tensor is in `.metadata`, a pickled torch Metadata. None of its objects is ever
built: every class it names becomes a record that does nothing, the records are checked, and a new Metadata is made of
what they hold. That one is used from then on; nothing opens the file a second time.
"""

import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from prism_mcore.checkpoint.folder import CheckpointError

INDEX = ".metadata"


def read_index(path: Path) -> Metadata:
    """The index of a checkpoint's tensors: `state_dict_metadata` maps each global name to dtype, shape and chunks.

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


def _rebuild(root: Any) -> Metadata:
    """A new index of what the records hold, every part of it checked."""
    fields = _state(root, _Metadata, dict)
    entries = _typed(fields.get("state_dict_metadata"), dict)
    objects = [name for name, entry in entries.items() if not isinstance(entry, _TensorStorageMetadata)]
    if objects:
        raise _Refused(f"it lists pickled objects, which are never loaded: {objects[:3]}")
    tensors = {_typed(name, str): _tensor(name, entry) for name, entry in entries.items()}
    places = {}
    for key, place in _typed(fields.get("storage_data"), dict).items():
        named = _state(key, _MetadataIndex, dict)
        places[MetadataIndex(_typed(named.get("fqn"), str), _sizes(named.get("offset")))] = _place(place)
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            if MetadataIndex(name, chunk.offsets) not in places:
                raise _Refused(f"it does not say where {name} is from {list(chunk.offsets)} on")
    return Metadata(tensors, storage_data=places)


def _tensor(name: str, record: Any) -> TensorStorageMetadata:
    fields = _state(record, _TensorStorageMetadata, dict)
    properties = _state(fields.get("properties"), _TensorProperties, tuple)
    dtype, size = _typed(properties[0] if properties else None, torch.dtype), _sizes(fields.get("size"))
    chunks = [_chunk(name, chunk, size) for chunk in _typed(fields.get("chunks"), list)]
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise _Refused(f"the chunks of {name} are not the whole of {list(size)}")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _chunk(name: str, record: Any, size: torch.Size) -> ChunkStorageMetadata:
    fields = _state(record, _ChunkStorageMetadata, dict)
    offsets, sizes = _sizes(fields.get("offsets")), _sizes(fields.get("sizes"))
    inside = len(offsets) == len(sizes) == len(size)
    if not inside or any(o + s > whole for o, s, whole in zip(offsets, sizes, size, strict=True)):
        raise _Refused(f"a chunk of {name}, {list(sizes)} from {list(offsets)} on, is not part of {list(size)}")
    return ChunkStorageMetadata(offsets, sizes)


def _place(record: Any) -> _StorageInfo:
    fields = _state(record, _StorageInfo_, dict)
    file, start, length = _typed(fields.get("relative_path"), str), fields.get("offset"), fields.get("length")
    if Path(file).name != file or not file.endswith(".distcp"):
        raise _Refused(f"it names {file!r}; needed: a .distcp file beside it")
    if fields.get("transform_descriptors"):
        raise _Refused(f"what it says of {file} is transformed: {fields['transform_descriptors']!r}")
    return _StorageInfo(file, *_sizes((start, length)))


def _state(record: Any, of: type, form: type) -> Any:
    return _typed(_typed(record, of).state, form)


def _typed(value: Any, of: type) -> Any:
    if not isinstance(value, of):
        raise _Refused(f"{type(value).__name__} stands where {of.__name__.strip('_')} belongs")
    return value


def _sizes(value: Any) -> torch.Size:
    numbers = _typed(value, tuple)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise _Refused(f"{numbers!r} stands where sizes belong")
    return torch.Size(numbers)
