"""Which model a folder holds: the same for a copy elsewhere, another for any other weights, however alike they look."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prism_mcore.checkpoint import old_format
from prism_mcore.checkpoint.durable import MANIFEST, FileRecord, describe, read_manifest
from prism_mcore.checkpoint.folder import STATE
from prism_mcore.checkpoint.index import INDEX
from prism_mcore.convert.read import read_directory

TEXT = (".json", ".jinja", ".model", ".txt")  # of a directory's other files: config, tokenizer, chat template


def identity(folder: Path) -> str:
    """A SHA-256 over the weights, and over all else that decides what a model computes and how text becomes its tokens.

    folder: a Hugging Face directory or a checkpoint. The hash of a file is the manifest's, where the folder has one
    that is younger than the file; else all of it is read (about 1 s for each GB and core). Nothing is kept for the
    next time. Raises ValueError, naming the file, for a directory that no program here would read.
    """
    if (folder / STATE).is_file():
        names = {path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".distcp")}
        names |= {name for name in (INDEX, old_format.INDEX) if (folder / name).is_file()}
    else:
        directory = read_directory(folder)
        names = set(directory.shards) | {path.name for path in directory.side_files if path.suffix in TEXT}
    known = _of_manifest(folder)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        hashes = dict(
            zip(sorted(names), threads.map(lambda name: _hash(folder / name, known), sorted(names)), strict=True)
        )
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def _of_manifest(folder: Path) -> dict[str, FileRecord]:
    """What the manifest says of the files that were written before it, and have the size that it says.

    Before, not with it: times of files are a few milliseconds coarse.
    """
    try:
        records = read_manifest(folder)["files"]
    except ValueError:
        return {}
    written = (folder / MANIFEST).stat().st_mtime_ns
    found = {name: (folder / name).stat() for name in records if (folder / name).is_file()}
    return {
        name: records[name]
        for name, stat in found.items()
        if stat.st_mtime_ns < written and stat.st_size == records[name]["size"]
    }


def _hash(path: Path, known: dict[str, FileRecord]) -> str:
    return (known.get(path.name) or describe(path))["sha256"]
