"""The folder of a run's checkpoints: whole or not at all, verified before they are opened, the newest found again.

<run>/checkpoints/
    step_00000100/           written as .tmp_step_00000100, synced, renamed when complete
        __0_0.safetensors .. what each rank has of every tensor
        tensors.json         the index: each tensor's dtype and shape, and where its pieces are
        state.json           everything that is not a tensor
        manifest.json        size and SHA-256 of every file above
    latest                   the name of the newest complete one
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from prism_mcore.agree import gather_failures
from prism_mcore.checkpoint.durable import FileRecord, damage, read_object, write_manifest
from prism_mcore.json_lines import JsonLines

FORMAT_VERSION = 2
READ_VERSIONS = (1, FORMAT_VERSION)  # 1 is read by old_format.py
STATE = "state.json"
LATEST, BEST = "latest", "best"
VALIDATION_FILE = "validation.jsonl"  # of the run, beside the folder of its checkpoints

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the same on every rank."""


def step_name(step: int) -> str:
    """The folder of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def complete_steps(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step_" + "[0-9]" * 8) if path.is_dir())


def best_of(steps: Sequence[Path], validation: Path, metric: str) -> Path | None:
    """Of these checkpoints the one with the best validation; None where none has one.

    metric: min: or max: and a key of the records of `validation`, JSON lines with a `step`; "" is none.
    """
    which, _, key = metric.partition(":")
    if not metric or not validation.is_file():
        return None
    try:
        values = {record["step"]: record[key] for _, _, record in JsonLines(validation) if record.get(key) is not None}
    except (ValueError, KeyError, OSError) as error:  # no reason to lose a save
        log.warning("checkpoint.keep_best: %s cannot be read: %s", validation, error)
        return None
    found = [(values[step], path) for path in steps if (step := int(path.name.removeprefix("step_"))) in values]
    return (min if which == "min" else max)(found)[1] if found else None


def latest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, else the newest complete one; None where there is none.

    A file that names none is warned of: it is one of many ways to be damaged, and the checkpoints are checked anyway.
    """
    steps, path = complete_steps(folder), folder / LATEST
    try:
        text = path.read_bytes().decode("utf-8").strip()
    except FileNotFoundError:
        return steps[-1] if steps else None
    except (OSError, UnicodeDecodeError) as error:
        log.warning("%s cannot be read (%s); taking the newest checkpoint", path, error)
        return steps[-1] if steps else None
    for step in steps:
        if step.name == text:
            return step
    log.warning("%s names %s, which is not there; taking the newest checkpoint", path, repr(text[:80]))
    return steps[-1] if steps else None


def checkpoint_in(path: Path) -> Path:
    """A checkpoint's folder, given that, a run's, or an import's: then the newest. Raises CheckpointError."""
    for folder in (path, path / "checkpoints"):
        if (found := folder if (folder / STATE).is_file() else latest(folder)) is not None:
            return found
    raise CheckpointError(f"{path} holds no checkpoint; give a checkpoint's folder, a run's, or what from-hf wrote")


def newest_undamaged(folder: Path) -> Path | None:
    """The newest checkpoint whose every file is as its manifest says; None where there is no checkpoint at all.

    Every rank calls it, and the ranks share the hashing. Damage is logged by file name.
    """
    candidates: list[list[Path]] = [[]]
    if dist.get_rank() == 0:
        newest = latest(folder)
        candidates = [[path for path in reversed(complete_steps(folder)) if newest is not None and path <= newest]]
    dist.broadcast_object_list(candidates, src=0)
    for path in candidates[0]:
        problems = gather_failures("; ".join(damage(path, dist.get_rank(), dist.get_world_size())))
        if not problems:
            return path
        if dist.get_rank() == 0:
            log.error("NOT loading %s: %s. Trying the checkpoint before it.", path, "; ".join(sorted(set(problems))))
    if candidates[0]:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged, see the log; move the folder away to start from the beginning"
        )
    return None


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint: format_version, step, layout, optimizer_step, state.

    Raises CheckpointError, naming the file, for unknown versions and for what is no such record.
    """
    try:
        record = read_object(path / STATE)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    version = record.get("format_version")
    if type(version) is not int or version not in READ_VERSIONS:
        raise CheckpointError(
            f"{path} has format version {version}; this program reads versions 1 and {FORMAT_VERSION}."
            " Load it with the version of prism_mcore that wrote it"
        )
    for key, kind in {"step": int, "layout": dict, "optimizer_step": int, "state": dict}.items():
        if type(record.get(key)) is not kind:
            raise CheckpointError(
                f"{path / STATE} is damaged: its {key} is {record.get(key)!r:.80}, not {kind.__name__}"
            )
    return record


def state_text(step: int, layout: dict[str, int], optimizer_step: int, state: dict[str, Any]) -> str:
    """What state.json says. Raises ValueError for numbers that JSON does not have."""
    record = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "layout": layout,
        "optimizer_step": optimizer_step,
        "state": state,
    }
    return json.dumps(record, indent=1, allow_nan=False)


def complete(path: Path, state: str, records: dict[str, FileRecord]) -> None:
    """Give a folder of tensors and their index the small files, and the manifest over all; state: `state_text`'s.

    records: of the files that are hashed already.
    """
    (path / STATE).write_text(state, encoding="utf-8")
    write_manifest(path, records)
