"""What an export consists of: size and SHA-256 of every file, and dtype, shape and SHA-256 of every tensor.

manifest.json
    {"version": 1,
     "files": {"model-00001-of-00002.safetensors": {"size": 4976698672, "sha256": "..."}, ...},
     "tensors": {"model-00001-of-00002.safetensors":
                 {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [128256, 4096], "sha256": "..."}, ...}}}
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from prism_mcore.checkpoint.durable import (
    MANIFEST,
    MANIFEST_VERSION,
    FileRecord,
    damage,
    describe,
    read_manifest,
    sync_file,
    write_atomically,
)
from prism_mcore.checkpoint.safetensors import Entry, Shard
from prism_mcore.convert.read import read_directory

TensorRecord = dict[str, Any]  # {"dtype": "BF16", "shape": [...], "sha256": hex}
CHUNK_BYTES = 32 * 2**20


def write_export_manifest(
    folder: Path, files: dict[str, FileRecord], tensors: dict[str, dict[str, TensorRecord]]
) -> None:
    """Write `folder`/manifest.json over every file in it; files: records that are known already."""
    for path in sorted(folder.iterdir()):
        if path.name not in files:
            sync_file(path)
            files[path.name] = describe(path)
    manifest = {"version": MANIFEST_VERSION, "files": dict(sorted(files.items())), "tensors": tensors}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))


def tensor_record(entry: Entry, digest: Any) -> TensorRecord:
    """What the manifest says of a tensor."""
    return {"dtype": entry.dtype, "shape": list(entry.shape), "sha256": digest.hexdigest()}


def tensor_records(folder: Path) -> dict[str, dict[str, TensorRecord]]:
    """What the manifest says of the tensors of each file. Raises ValueError, naming it, where it says nothing."""
    recorded = read_manifest(folder).get("tensors")
    of_files = recorded.values() if isinstance(recorded, dict) else [None]
    of_tensors = [record for records in of_files for record in (records.values() if isinstance(records, dict) else [0])]
    if not all(isinstance(record, dict) and {"dtype", "shape", "sha256"} <= record.keys() for record in of_tensors):
        raise ValueError(f"{folder / MANIFEST} does not give dtype, shape and SHA-256 of each tensor")
    assert isinstance(recorded, dict)
    return recorded


def verify(folder: Path) -> list[str]:
    """What is wrong with an export, one line per file or tensor; empty when all is as its manifest says."""
    problems = damage(folder)
    try:
        recorded = tensor_records(folder)
        shards = read_directory(folder).shards
    except (OSError, ValueError) as error:  # ExchangeError is a ValueError
        return problems or [str(error)]
    if recorded.keys() != shards.keys():
        problems.append(f"{folder / MANIFEST} lists tensors of {sorted(recorded)}; there are {sorted(shards)}")
    damaged = {problem.split(" ")[0] for problem in problems}
    for file in shards.keys() & recorded.keys():
        # Equal files have equal tensors: reading them again only helps to say which one is not.
        if str(folder / file) in damaged or _described(shards[file]) != _described_by(recorded[file]):
            problems += _tensor_problems(folder / file, shards[file], recorded[file])
    return problems


def _described(shard: Shard) -> dict[str, tuple]:
    return {name: (entry.dtype, list(entry.shape)) for name, entry in shard.entries.items()}


def _described_by(records: dict[str, TensorRecord]) -> dict[str, tuple]:
    return {name: (record["dtype"], record["shape"]) for name, record in records.items()}


def _tensor_problems(path: Path, shard: Shard, records: dict[str, TensorRecord]) -> list[str]:
    problems = [
        f"{path}: {name} is in the file or in the manifest, not in both"
        for name in shard.entries.keys() ^ records.keys()
    ]
    with open(path, "rb") as file:
        for name in shard.entries.keys() & records.keys():
            entry, digest = shard.entries[name], hashlib.sha256()
            file.seek(shard.data_start + entry.start)
            for start in range(entry.start, entry.end, CHUNK_BYTES):
                digest.update(file.read(min(CHUNK_BYTES, entry.end - start)))
            if tensor_record(entry, digest) != records[name]:
                problems.append(f"{path}: {name} is not the tensor that was exported")
    return sorted(problems)
