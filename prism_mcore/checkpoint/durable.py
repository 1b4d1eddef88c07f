"""Files that survive a crash: written through to the disk, hashed into a manifest, checked before they are opened."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1

FileRecord = dict[str, Any]  # {"size": bytes, "sha256": hex}


def describe(path: Path) -> FileRecord:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}


def sync_file(path: Path) -> None:
    """Return when the file's content is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Return when the folder's entries (new names, renames, removals) are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace the file by `text`: a reader finds the old content or the new, never a part."""
    temporary = path.with_name(f".tmp_{path.name}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_manifest(folder: Path, known: dict[str, FileRecord]) -> None:
    """Write `folder`/manifest.json over every file in it; known: records already computed, by name.

    A network file system may not list yet what another node has just written: those files are known.
    """
    listed = {path.name for path in folder.iterdir()} - {MANIFEST}
    for name in listed - known.keys():
        sync_file(folder / name)
    records = {name: known.get(name) or describe(folder / name) for name in sorted(listed | known.keys())}
    write_atomically(folder / MANIFEST, json.dumps({"version": MANIFEST_VERSION, "files": records}, indent=1))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a small file holds. Raises ValueError, naming the file, where it holds none."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:  # not text, and not JSON, are ValueErrors
        raise ValueError(f"{path} cannot be read: {error!r}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} cannot be read: it holds {type(value).__name__}, not an object")
    return value


def read_manifest(folder: Path) -> dict[str, Any]:
    """The folder's manifest: "files" maps names to records. Raises ValueError, naming the file."""
    path = folder / MANIFEST
    manifest = read_object(path)
    if (version := manifest.get("version")) != MANIFEST_VERSION:
        raise ValueError(f"{path} has version {version}; this program reads version {MANIFEST_VERSION}")
    files = manifest.get("files")
    records = files.values() if isinstance(files, dict) else [None]
    if not all(isinstance(record, dict) and {"size", "sha256"} <= record.keys() for record in records):
        raise ValueError(f"{path} cannot be read: it does not give the size and SHA-256 of each file")
    return manifest


def damage(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files that the folder's manifest lists, one line per file; empty when all is well.

    part, parts: check only every parts-th file, so that ranks share the hashing of a large checkpoint.
    """
    try:
        records: dict[str, FileRecord] = read_manifest(folder)["files"]
        problems = [_damage_of(folder, name, record) for name, record in sorted(records.items())[part::parts]]
        unlisted = _unlisted(folder, records) if part == 0 else []
    except ValueError as error:
        return [str(error)]
    except OSError as error:
        return [f"{folder} cannot be read: {error}"]
    return unlisted + [problem for problem in problems if problem]


def _damage_of(folder: Path, name: str, record: FileRecord) -> str:
    path = folder / name
    if Path(name).name != name or name == "..":
        return f"{folder / MANIFEST} lists {name!r}, which is not a file of this folder"
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != record["size"]:
        return f"{path} has {size} bytes, the manifest says {record['size']}"
    if describe(path)["sha256"] != record["sha256"]:
        return f"{path} is damaged: its SHA-256 is not the manifest's"
    return ""


def _unlisted(folder: Path, records: Iterable[str]) -> list[str]:
    names = {path.name for path in folder.iterdir()} - set(records) - {MANIFEST}
    return [f"{folder / name} is not in the manifest" for name in sorted(names)]
