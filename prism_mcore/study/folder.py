"""A study's folder: whose it is, who works in it, and what is done there."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from prism_mcore.checkpoint.durable import read_object, write_atomically
from prism_mcore.checkpoint.lock import exclusive
from prism_mcore.config import SettingsError
from prism_mcore.console import say, show
from prism_mcore.plan.report import numbers
from prism_mcore.study import record
from prism_mcore.study.graph import Node, folder_of
from prism_mcore.study.settings import StudyProgram

OWNER = "study.json"


def claim(study: StudyProgram, recipe: Path, make: bool) -> Path:
    """The folder, made where it is missing. Raises SettingsError where it is another study's or no study's."""
    folder = folder_of(study)
    own = {"recipe": recipe.name}
    if (folder / OWNER).is_file():
        found = read_object(folder / OWNER)
        if found != own:
            raise SettingsError(
                f"{folder} is the folder of another study, {found.get('recipe')}; give study.name or study.dir"
            )
        return folder
    if folder.is_dir() and any(folder.iterdir()):
        raise SettingsError(f"{folder} is there and is no study's folder; give study.name or study.dir")
    if make:
        if not Path("launch/study.py").is_file():
            raise SettingsError("start it from the repository's root: its programs are launch/*.py and tools/*.py")
        (folder / "slurm").mkdir(parents=True, exist_ok=True)
        write_atomically(folder / OWNER, json.dumps(own))
    return folder


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One driver at a time. Raises RuntimeError, naming the other."""
    with exclusive(folder / "study.lock"):
        yield


def print_status(nodes: Mapping[str, Node], queued: Mapping[str, str]) -> None:
    """A line per node: done, queued (as Slurm says it), begun or to run; and how many of each."""
    rows, count = [], Counter[str]()
    for node in nodes.values():
        state = state_of(node, nodes)
        count[state] += 1
        seconds = "-"
        if state == "done":
            seconds = f"{read_object(node.folder / record.DONE)['seconds']:.0f}"
        rows.append((node.name, node.kind, queued.get(node.name, state), seconds))
    show(numbers("", ("node", "what", "state", "s"), rows))
    say(", ".join(f"{number} {state}" for state, number in count.most_common()))


def state_of(node: Node, nodes: Mapping[str, Node]) -> str:
    if not record.reasons(node, nodes):
        return "done"
    if (node.folder / record.DONE).is_file():
        return "to do again"
    return "begun" if (node.folder / record.BEGUN).is_file() else "to run"


def print_why(nodes: Mapping[str, Node], name: str) -> None:
    found = record.reasons(nodes[name], nodes)
    for reason in found or ["it is done: recipe, inputs and outputs are what they were"]:
        say(f"{name}: {reason}")
