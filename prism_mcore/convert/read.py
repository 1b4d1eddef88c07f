"""A Hugging Face directory of safetensors files: what is in it, checked before a number is read.

Its layout (shard names, headers to the byte, side files) can be kept in a small folder, from which an export gives the
same files again when the directory itself is gone.
"""

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prism_mcore.checkpoint import safetensors
from prism_mcore.checkpoint.durable import MANIFEST, read_object, sync_file, sync_folder
from prism_mcore.checkpoint.files import read_exactly
from prism_mcore.checkpoint.safetensors import Entry, NotSafetensors, Shard, some, unambiguous
from prism_mcore.convert.names import ExchangeError, HFTensor, hf_tensors
from prism_mcore.model.spec import ModelSpec, UnsupportedModel, read_spec

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LAYOUT = "layout.json"
LAYOUT_VERSION = 1
DTYPES = ("BF16", "F16", "F32")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")  # what an index names
ADAPTER = "adapter_config.json"
# Tensors that follow from config.json, which earlier versions of transformers saved and later ones read past.
BUFFER = re.compile(r"(.+\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
TIED_ROWS = 4096  # compared at once

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HFDirectory:
    """A Hugging Face directory, or the layout of one that was kept."""

    folder: Path
    shards: dict[str, Shard]  # by file name
    side_files: tuple[Path, ...]  # config, tokenizer, index: all that is copied as it is

    @property
    def names(self) -> set[str]:
        return {name for _, name, _ in self.entries()}

    @property
    def buffers(self) -> list[str]:
        """Tensors that are no parameters: what they hold follows from config.json."""
        return [name for shard in self.shards.values() for name in shard.entries if BUFFER.fullmatch(name)]

    def entries(self) -> Iterator[tuple[str, str, Entry]]:
        """(file, tensor, entry) in the order of files and bytes, without buffers."""
        for file, shard in self.shards.items():
            for name, entry in shard.entries.items():
                if not BUFFER.fullmatch(name):
                    yield file, name, entry

    def spec(self) -> ModelSpec:
        """The model's shape; an ExchangeError for what the engine cannot run."""
        try:
            return read_spec(self.folder / "config.json")
        except (UnsupportedModel, FileNotFoundError) as error:
            raise ExchangeError(str(error)) from error

    def tensors(self, spec: ModelSpec) -> dict[str, HFTensor]:
        """What the names mean for this model; an ExchangeError unless every tensor, and no other, is there."""
        names = self.names
        tensors = hf_tensors(spec, names)
        self._check(tensors)
        return {name: tensor for name, tensor in tensors.items() if name in names}

    def _check(self, tensors: dict[str, HFTensor]) -> None:
        for file, name, entry in self.entries():
            if name not in tensors:
                raise ExchangeError(
                    f"{self.folder / file} has {name}, which nothing would read: the model that config.json describes"
                    " has no such tensor. Take the directory with the config.json that belongs to it, or, where the"
                    " model is whole without the tensor, a copy of the files without it"
                )
            if entry.shape != tensors[name].shape:
                raise ExchangeError(
                    f"{self.folder / file}: {name} has the shape {list(entry.shape)};"
                    f" config.json needs {list(tensors[name].shape)}"
                )
        names = self.names
        missing = [name for name, tensor in tensors.items() if name not in names and not tensor.optional]
        if missing:
            raise ExchangeError(f"{self.folder} has no {some(missing)}, which the model needs")


def read_directory(folder: Path) -> HFDirectory:
    """The directory's files and headers, all checked against each other and against the files' sizes.

    Raises ExchangeError naming the file, and the tensor where there is one.
    """
    if not folder.is_dir():
        raise ExchangeError(f"{folder} is not a directory; needed: one with config.json and safetensors files")
    index = folder / INDEX
    if not index.is_file() and not (folder / SINGLE).is_file():
        raise ExchangeError(_no_safetensors(folder))
    files = _read_index(index) if index.is_file() else {SINGLE: None}
    _refuse_ambiguity(folder, files.keys())
    for file, listed in files.items():
        if not (folder / file).is_file():
            raise ExchangeError(f"{index} names {file}, with {some(listed or [])}; it is missing from {folder}")
    shards = {file: _read_shard(folder / file) for file in files}
    for file, listed in files.items():
        if listed is not None:
            _check_listed(index, folder / file, set(listed), set(shards[file].entries))
    directory = HFDirectory(folder, shards, tuple(side_files(folder)))
    if directory.buffers:
        log.warning("note: %s of %s is read past: it follows from config.json", some(directory.buffers), folder)
    return directory


def check_same_model(source: HFDirectory, layout: HFDirectory) -> None:
    """Raise ExchangeError, naming the first difference, unless both are checkpoints of one architecture."""
    for field, (ours, theirs) in source.spec().differences(layout.spec()).items():
        raise ExchangeError(f"{source.folder} and {layout.folder} are different models: {field} is {ours} and {theirs}")
    if lacking := sorted(layout.names - source.names):
        raise ExchangeError(f"{source.folder} has no {lacking[0]}, which {layout.folder} has")
    if extra := sorted(source.names - layout.names):
        raise ExchangeError(f"{source.folder} has {extra[0]}, which {layout.folder} has not")
    shapes = {name: entry.shape for _, name, entry in layout.entries()}
    for file, name, entry in source.entries():
        if entry.shape != shapes[name]:
            raise ExchangeError(
                f"{source.folder / file}: {name} has the shape {list(entry.shape)}; {layout.folder} has"
                f" {list(shapes[name])}"
            )


def _refuse_ambiguity(folder: Path, files: Collection[str]) -> None:
    """An ExchangeError where transformers and this program, or two readers of the files, could take other weights.

    files: those that the index names or, without one, the single file.
    """
    index, single = folder / INDEX, folder / SINGLE
    if single.is_file() and set(files) != {SINGLE}:
        raise ExchangeError(
            f"{folder} holds two sets of weights: {single}, which transformers takes, and {index}, which names"
            f" {some(sorted(set(files) - {SINGLE}))}; remove the one that is not meant"
        )
    unnamed = sorted(path.name for path in folder.iterdir() if SHARD.fullmatch(path.name) and path.name not in files)
    if unnamed:
        named = f"{index} does not name" if index.is_file() else f"lies beside {single} without an index"
        what = f"{named} {some(unnamed)}" if index.is_file() else f"{folder / unnamed[0]} {named}"
        raise ExchangeError(f"{what}; remove what is left of other weights, or take the whole directory again")
    if (folder / ADAPTER).is_file():
        raise ExchangeError(
            f"{folder / ADAPTER} is of an adapter, which transformers adds to the weights beside it; merge it into them"
            " first, or remove its files to take the weights without it"
        )


def keep_directory(source: HFDirectory, folder: Path) -> None:
    """Write the layout and the side files of a directory to a small folder, in place of what was there."""
    temporary = folder.with_name(f".tmp_{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for path in source.side_files:
        shutil.copyfile(path, temporary / path.name)
    headers = {file: shard.header for file, shard in source.shards.items()}
    layout = {"version": LAYOUT_VERSION, "headers": headers}
    (temporary / LAYOUT).write_text(json.dumps(layout, indent=1), encoding="utf-8")
    for path in temporary.iterdir():
        sync_file(path)
    sync_folder(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def kept_directory(folder: Path) -> HFDirectory:
    """The source whose layout `keep_directory` wrote."""
    try:
        layout = read_object(folder / LAYOUT)
    except ValueError as error:
        raise ExchangeError(str(error)) from error
    version, headers = layout.get("version"), layout.get("headers")
    if version != LAYOUT_VERSION:
        raise ExchangeError(f"{folder / LAYOUT} has version {version}; this program reads version {LAYOUT_VERSION}")
    if not isinstance(headers, dict) or not all(isinstance(header, str) for header in headers.values()):
        raise ExchangeError(f"{folder / LAYOUT} is damaged: it does not give the header of each file")
    if foreign := [file for file in headers if Path(file).name != file]:
        raise ExchangeError(f"{folder / LAYOUT} is damaged: it names {foreign[0]!r}, which is not a file's name")
    shards = {file: Shard(header, parse_header(header, folder / file)) for file, header in headers.items()}
    return HFDirectory(folder, shards, tuple(path for path in side_files(folder) if path.name != LAYOUT))


class HFTensors(contextlib.ExitStack):
    """Rows of the tensors of a Hugging Face directory, read without mapping the files."""

    def __init__(self, source: HFDirectory):
        super().__init__()
        self.source, self.descriptors = source, dict[str, int]()
        self.places = {name: (file, entry) for file, name, entry in source.entries()}

    def read(self, name: str, row: int, out: Tensor) -> None:
        """Fill `out`, contiguous and of the tensor's dtype, with its rows from `row` on."""
        file, entry = self.places[name]
        if file not in self.descriptors:
            self.descriptors[file] = os.open(self.source.folder / file, os.O_RDONLY)
            self.callback(os.close, self.descriptors[file])
        start = self.source.shards[file].data_start + entry.start + row * (entry.end - entry.start) // entry.shape[0]
        if not read_exactly(self.descriptors[file], start, out):
            raise ExchangeError(f"{self.source.folder / file} ends before byte {start + out.nbytes}: it is truncated")

    def check_tied(self, tensors: dict[str, HFTensor], start: int, stop: int) -> None:
        """Raise ExchangeError where rows of an output layer differ from the embedding that it is tied to."""
        for name, tensor in tensors.items():
            if not tensor.optional:
                continue
            tied = next(n for n, other in tensors.items() if other.runs == tensor.runs and not other.optional)
            for row in range(start, stop, TIED_ROWS):
                if not torch.equal(*(self._rows(n, row, min(stop, row + TIED_ROWS)) for n in (name, tied))):
                    raise ExchangeError(
                        f"{self.source.folder / self.places[name][0]}: {name} differs from {tied}, but config.json"
                        " says tie_word_embeddings=true; set it to false in a copy of the directory to keep both"
                    )

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        entry = self.places[name][1]
        rows = torch.empty((stop - start, *entry.shape[1:]), dtype=entry.torch_dtype)
        self.read(name, start, rows)
        return rows


def _read_index(index: Path) -> dict[str, list[str] | None]:
    """The files that the index names, sorted, and the tensors it puts in each."""
    try:
        text = index.read_bytes().decode("utf-8")
        weight_map = json.loads(text, object_pairs_hook=unambiguous)["weight_map"]
        files: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ExchangeError(f"{index} names {file!r} for {name}; needed: a safetensors file beside it")
            files.setdefault(file, []).append(name)
    except ExchangeError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ExchangeError(f"{index} is not an index of safetensors files: {error!r}") from error
    return dict(sorted(files.items()))


def parse_header(header: str, file: Path) -> dict[str, Entry]:
    """The tensors of a shard's header in the order of their bytes; `file` is what messages call it."""
    with _as_exchange_error():
        return safetensors.parse_header(header, file, DTYPES)


def _read_shard(path: Path) -> Shard:
    with _as_exchange_error():
        return safetensors.read_shard(path, DTYPES)


@contextlib.contextmanager
def _as_exchange_error() -> Iterator[None]:
    try:
        yield
    except NotSafetensors as error:
        raise ExchangeError(str(error)) from error


def _check_listed(index: Path, path: Path, listed: set[str], found: set[str]) -> None:
    if lacking := sorted(listed - found):
        raise ExchangeError(f"{index} says that {path.name} has {some(lacking)}; it has not")
    if extra := sorted(name for name in found - listed if not BUFFER.fullmatch(name)):
        raise ExchangeError(f"{path} has {some(extra)}, of which {index.name} says nothing")


def side_files(folder: Path) -> Iterable[Path]:
    """The files of a directory that are copied as they are: all but weights, their indices, manifests, hidden ones."""
    for path in sorted(folder.iterdir()):
        hidden, weights = path.name.startswith("."), path.name.endswith(WEIGHTS)
        index_of_others = path.name.endswith(".index.json") and path.name != INDEX
        if path.is_file() and not (hidden or weights or index_of_others or path.name == MANIFEST):
            yield path


def _no_safetensors(folder: Path) -> str:
    foreign = sorted(path.name for path in folder.iterdir() if path.name.endswith((".bin", ".pt", ".pth")))
    if not foreign:
        return f"{folder} has neither {SINGLE} nor {INDEX}"
    return (
        f"{folder / foreign[0]} is a pickle, and only safetensors is read; convert it where you trust the file:"
        " python -c 'from transformers import AutoModelForCausalLM as M;"
        f' M.from_pretrained("{folder}", dtype="auto").save_pretrained("{folder}-safetensors")\''
    )
