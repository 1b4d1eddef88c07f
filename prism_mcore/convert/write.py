"""A Hugging Face directory written from anything that gives rows of its tensors, in bounded memory."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from prism_mcore.checkpoint.durable import FileRecord, sync_folder
from prism_mcore.checkpoint.files import BLOCK_BYTES, BLOCKS_WAITING, Buffers, HashedFile, Workers, as_bytes
from prism_mcore.checkpoint.safetensors import Entry, Shard, make_shard
from prism_mcore.convert.manifest import TensorRecord, tensor_record, write_export_manifest
from prism_mcore.convert.names import ExchangeError, hf_tensors
from prism_mcore.convert.read import BUFFER, INDEX, SINGLE, HFDirectory
from prism_mcore.model.spec import ModelSpec

SHARD_BYTES = 5 * 10**9  # of a model that did not come from Hugging Face

# (tensor, first row, out): fill `out`, [rows, ...] of the tensor's shape and dtype, with rows from the first on
ReadRows = Callable[[str, int, Tensor], None]


def write_directory(
    out: Path, source: HFDirectory, read_rows: ReadRows, on_bytes: Callable[[int], None] = lambda size: None
) -> None:
    """Write a model in the layout of `source`, with its side files and a manifest, to a directory that is not there.

    on_bytes: told of the size of every block written. Raises ExchangeError
    where the disk is full or cannot be written; then nothing is left behind.
    """
    source = without_buffers(source)
    with new_directory(out) as folder:
        for path in source.side_files:
            shutil.copyfile(path, folder / path.name)
        files: dict[str, FileRecord] = {}
        tensors: dict[str, dict[str, TensorRecord]] = {}
        buffers = Buffers(BLOCKS_WAITING + 2)
        with Workers() as workers:
            for name, shard in source.shards.items():
                files[name], tensors[name] = _write_shard(folder / name, shard, workers, buffers, read_rows, on_bytes)
        if (text := index_text(source)) is not None:
            (folder / INDEX).write_text(text, encoding="utf-8")
        write_export_manifest(folder, files, tensors)


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory that gets its name when the block has ended well, and disappears when it has not.

    Raises ExchangeError where `out` exists, and where the disk is full or cannot be written.
    """
    if out.exists():
        raise ExchangeError(f"{out} exists already; remove it, or write to another directory")
    folder = out.with_name(f".tmp_{out.name}")
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir(parents=True)
        yield folder
        sync_folder(folder)
        os.replace(folder, out)
        sync_folder(out.parent)
    except OSError as error:
        raise ExchangeError(
            f"cannot write {out}: {error}. {_free_space(out.parent)} The unfinished directory was removed"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _free_space(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"The disk of {folder} has {shutil.disk_usage(folder).free / 2**30:.2f} GiB free."


def _write_shard(
    path: Path,
    shard: Shard,
    workers: Workers,
    buffers: Buffers,
    read_rows: ReadRows,
    on_bytes: Callable[[int], None],
) -> tuple[FileRecord, dict[str, TensorRecord]]:
    digests = {name: hashlib.sha256() for name in shard.entries}
    file = HashedFile(path, workers)
    try:
        header = shard.header.encode()
        file.append(len(header).to_bytes(8, "little") + header)
        for name, entry in shard.entries.items():
            for start, stop in blocks(entry):
                block = buffers.take((stop - start, *entry.shape[1:]), entry.torch_dtype)
                read_rows(name, start, block)
                data = as_bytes(block)
                file.append(data, digests[name])
                on_bytes(len(data))
    finally:
        file.close()
    return file.record, {name: tensor_record(entry, digests[name]) for name, entry in shard.entries.items()}


def is_wider(dtype: torch.dtype, target: torch.dtype) -> bool:
    """Whether numbers of `dtype` are rounded when they are written as `target`."""
    return torch.promote_types(dtype, target) != target


def rounding(names: Sequence[str], out: str | Path) -> str:
    """What is said where tensors are written in a narrower dtype than the model has."""
    rest = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    return f"{names[0]}{rest} are rounded to the dtype that the model's directory had when it is written to {out}"


def blocks(entry: Entry) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) of a tensor, about BLOCK_BYTES at a time."""
    rows = entry.shape[0]
    each = max(1, BLOCK_BYTES * rows // max(1, entry.end - entry.start))
    for start in range(0, rows, each):
        yield start, min(rows, start + each)


# --- layouts that no directory gave -----------------------------------------------------------------------------------


def conventional_directory(
    spec: ModelSpec,
    folder: Path,
    side_files: tuple[Path, ...],
    dtypes: dict[str, torch.dtype],
    shard_bytes: int = SHARD_BYTES,
) -> HFDirectory:
    """The layout in which Hugging Face would write a model: the family's names, shards of at most `shard_bytes`.

    dtypes: of each tensor by Hugging Face's name. A tied output layer is left out.
    """
    tensors = {name: tensor for name, tensor in hf_tensors(spec).items() if not tensor.optional}
    groups: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        bytes_ = torch.Size(tensor.shape).numel() * dtypes[name].itemsize
        if groups[-1] and size + bytes_ > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = dtypes[name], tensor.shape
        size += bytes_
    # The order that safetensors itself writes: wide dtypes first, then by name.
    ordered = [dict(sorted(group.items(), key=lambda item: (-item[1][0].itemsize, item[0]))) for group in groups]
    if len(ordered) == 1:
        return HFDirectory(folder, {SINGLE: make_shard(ordered[0], SINGLE)}, side_files)
    names = [f"model-{i:05d}-of-{len(ordered):05d}.safetensors" for i in range(1, len(ordered) + 1)]
    return HFDirectory(folder, {n: make_shard(g, n) for n, g in zip(names, ordered, strict=True)}, side_files)


def in_fp32(source: HFDirectory) -> HFDirectory:
    """The same layout with every tensor in fp32."""
    shards = {}
    for file, shard in source.shards.items():
        tensors = {name: (torch.float32, entry.shape) for name, entry in shard.entries.items()}
        shards[file] = make_shard(tensors, file, json.loads(shard.header).get("__metadata__"))
    return replace(source, shards=shards, side_files=tuple(path for path in source.side_files if path.name != INDEX))


def without_buffers(source: HFDirectory) -> HFDirectory:
    """The same layout without the tensors that nothing reads, and thus nobody can write."""
    if not source.buffers:
        return source
    shards = {}
    for file, shard in source.shards.items():
        entries = {name: entry for name, entry in shard.entries.items() if not BUFFER.fullmatch(name)}
        tensors = {name: (entry.torch_dtype, entry.shape) for name, entry in entries.items()}
        shards[file] = make_shard(tensors, file, json.loads(shard.header).get("__metadata__"))
    shards = {file: shard for file, shard in shards.items() if shard.entries}
    return replace(source, shards=shards, side_files=tuple(path for path in source.side_files if path.name != INDEX))


def index_text(source: HFDirectory) -> str | None:
    """The index to write beside the shards; None where there is one file, or the source's own index is copied."""
    if INDEX in {path.name for path in source.side_files} or set(source.shards) == {SINGLE}:
        return None
    entries = list(source.entries())
    index = {
        "metadata": {
            "total_parameters": sum(torch.Size(entry.shape).numel() for _, _, entry in entries),
            "total_size": sum(entry.end - entry.start for _, _, entry in entries),
        },
        "weight_map": {name: file for file, name, _ in sorted(entries, key=lambda item: item[1])},
    }
    return json.dumps(index, indent=2) + "\n"
