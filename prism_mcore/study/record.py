"""Is a node done? A record with the hashes of its recipe, inputs and outputs says so, written when all of it is."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prism_mcore.checkpoint.durable import describe, read_object, write_atomically
from prism_mcore.study.graph import Node

DONE, BEGUN = "done.json", "begun.json"


def key_of(node: Node, nodes: Mapping[str, Node]) -> dict[str, Any]:
    """Hash of what it runs, and of what it reads. Raises ValueError where a node before it is not done."""
    commands = [command.argv for command in node.commands]
    text = json.dumps([node.recipe, commands])
    return {
        "recipe": hashlib.sha256(text.encode()).hexdigest(),
        "inputs": {need: read_object(nodes[need].folder / DONE)["output"] for need in node.needs},
    }


def reasons(node: Node, nodes: Mapping[str, Node]) -> list[str]:
    """Why it would run; empty where it is done."""
    waiting = [need for need in node.needs if not (nodes[need].folder / DONE).is_file()]
    if not (node.folder / DONE).is_file():
        begun = "was begun and not finished: it resumes" if (node.folder / BEGUN).is_file() else "has not run"
        return [begun, *(f"waits for {need}" for need in waiting)]
    try:
        done = read_object(node.folder / DONE)
    except ValueError as error:
        return [str(error)]
    if waiting:
        return [f"{need}, which it reads, is not done" for need in waiting]
    key = key_of(node, nodes)
    found = ["its recipe or command has changed"] if key["recipe"] != done["recipe"] else []
    new = {need for need, output in key["inputs"].items() if done["inputs"].get(need) != output}
    found += [f"{need}, which it reads, has another result now" for need in sorted(new)]
    if set(done["inputs"]) - set(key["inputs"]):
        found.append("it read more than it would now")
    return found + _lost(node, done["files"])


def _lost(node: Node, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Outputs that are not what they were; a file of the same size and time is taken for the same."""
    for name, record in files.items():
        path = Path(name)
        if not path.is_file():
            return [f"its output {path} is lost"]
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) != (record["size"], record["mtime_ns"]) and (
            describe(path)["sha256"] != record["sha256"]
        ):
            return [f"its output {path} has changed"]
    return []


def begin(node: Node, key: Mapping[str, Any]) -> None:
    """Ready the folder: what an earlier run left is resumed where recipe and inputs are the same, else removed."""
    earlier: dict[str, Any] = {}
    if (node.folder / BEGUN).is_file():
        earlier = read_object(node.folder / BEGUN)
    if node.folder.exists() and earlier != key:
        shutil.rmtree(node.folder)
    node.folder.mkdir(parents=True, exist_ok=True)
    (node.folder / DONE).unlink(missing_ok=True)
    write_atomically(node.folder / BEGUN, json.dumps(key, indent=1))


def finish(node: Node, key: Mapping[str, Any], seconds: float) -> None:
    """Write the record. Raises ValueError where an output is not there."""
    files = {}
    for output in node.outputs:
        found = list(_files(output))
        if not found:
            raise ValueError(f"{node.name} ended well and left no {output}")
        for path in found:
            files[str(path)] = describe(path) | {"mtime_ns": path.stat().st_mtime_ns}
    first = [files[str(path)]["sha256"] for path in _files(node.outputs[0])]
    record = {
        **key,
        "output": hashlib.sha256("".join(first).encode()).hexdigest(),
        "files": files,
        "seconds": round(seconds, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_atomically(node.folder / DONE, json.dumps(record, indent=1))


def _files(output: Path) -> Iterator[Path]:
    if output.is_dir():
        yield from (path for path in sorted(output.rglob("*")) if path.is_file())
    elif output.is_file():
        yield output
