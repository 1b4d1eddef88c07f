"""A study on this machine: nodes in the order of the graph, a few at the same time, each a process of its own.

The driver (doit) starts `launch/study.py ... run NODE`; that process runs the node's commands in turn. Each is
killed with the one that started it, so that nothing of a killed study writes on beside its next start.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from prism_mcore.console import say
from prism_mcore.exit_codes import BAD_SETTINGS, DONE, FAILED, STOPPED_BY_SIGNAL
from prism_mcore.program import environment
from prism_mcore.study import record
from prism_mcore.study.graph import Command, Node, full_argv

LOG = "log"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_node(node: Node, nodes: Mapping[str, Node], start: Callable[[Command], list[str]] = full_argv) -> int:
    """Run what is missing of a node whose inputs are done; returns the exit code of the command that failed, or 0.

    start: the process of a command, on this machine or in a Slurm job.
    """
    try:
        key = record.key_of(node, nodes)
    except ValueError as error:
        say(f"error: {node.name} cannot run yet: {error}", stderr=True)
        return BAD_SETTINGS
    if not record.reasons(node, nodes):
        return DONE
    begun = time.monotonic()
    record.begin(node, key)
    with (node.folder / LOG).open("ab") as log:
        for command in node.commands:
            if command.replaces is not None and command.replaces.exists():
                subprocess.run(["rm", "-rf", "--", str(command.replaces)], check=True)
            code = _run(start(command), log)
            if code:
                return code
    try:
        record.finish(node, key, time.monotonic() - begun)
    except ValueError as error:
        say(f"error: {error}", stderr=True)
        return FAILED
    return DONE


def _run(argv: list[str], log: IO[bytes]) -> int:
    """A process that ends with this one; SIGTERM, SIGUSR1 and Ctrl-C are handed on, so that a run saves."""
    log.write(f"$ {' '.join(argv)}\n".encode())
    log.flush()
    process = subprocess.Popen(argv, stdout=log, stderr=log, preexec_fn=_end_with_parent)

    def hand_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run_all(nodes: Mapping[str, Node], recipe: Path, overrides: Sequence[str], workers: int, folder: Path) -> int:
    """Everything that is not done, by doit; returns an exit code.

    A node that fails does not stop those that do not need it.
    """
    from doit.cmd_base import ModuleTaskLoader
    from doit.doit_cmd import DoitMain

    driver = _Driver(nodes, recipe, overrides, workers)
    before = {number: signal.signal(number, driver.stop) for number in (signal.SIGTERM, signal.SIGINT)}
    settings = {
        "dep_file": str(folder / ".doit.json"),
        "backend": "json",
        "reporter": _Reporter(sys.stdout, driver),
        "continue": True,
    }
    settings |= {"num_process": workers, "par_type": "thread", "verbosity": 0}
    (folder / ".doit.json").unlink(missing_ok=True)  # what is done the records say; doit's own is of no use if killed
    streams = sys.stdout, sys.stderr
    try:
        loader = ModuleTaskLoader({"DOIT_CONFIG": settings, "task_nodes": driver.tasks})
        code = DoitMain(loader).run(["run"])
    finally:
        sys.stdout, sys.stderr = streams  # doit's threads put them back in any order
        for number, handler in before.items():
            signal.signal(number, handler)
    if driver.stopped:
        say("stopped; the same command resumes", stderr=True)
        return STOPPED_BY_SIGNAL
    for name, failed in driver.failed.items():
        say(f"error: {name} ended with code {failed}; see {nodes[name].folder / LOG}", stderr=True)
    return FAILED if code or driver.failed else DONE


class _Driver:
    """The graph for doit, and the processes that run."""

    def __init__(self, nodes: Mapping[str, Node], recipe: Path, overrides: Sequence[str], workers: int):
        self.nodes, self.recipe, self.overrides, self.workers = nodes, recipe, overrides, workers
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.failed: dict[str, int] = {}
        self.stopped = False

    def tasks(self) -> Any:
        for node in self.nodes.values():
            yield {
                "basename": f"node:{node.name}".replace(":", "-", 1),
                "task_dep": [f"node-{need}" for need in node.needs],
                "uptodate": [(self._is_done, [node.name])],
                "actions": [(self._run, [node.name])],
            }

    def _is_done(self, name: str) -> bool:
        return not record.reasons(self.nodes[name], self.nodes)

    def _run(self, name: str) -> bool:
        if self.stopped:
            return False
        threads = max(1, len(os.sched_getaffinity(0)) // self.workers)
        # A child of this thread, which lives until all nodes are done.
        argv = [sys.executable, "launch/study.py", "--recipe", str(self.recipe), "run", name, *self.overrides]
        process = subprocess.Popen(argv, env={"OMP_NUM_THREADS": str(threads)} | environment())
        self.running[name] = process
        code = process.wait()
        del self.running[name]
        if code and not self.stopped:
            self.failed[name] = code
        return code == 0

    def stop(self, number: int, frame: FrameType | None) -> None:
        """What runs saves and ends; nothing else starts."""
        self.stopped = True
        for process in list(self.running.values()):
            process.send_signal(signal.SIGTERM)


class _Reporter:
    """A line when a node starts and when it ends."""

    def __init__(self, out: Any, driver: _Driver):
        self.out, self.driver = out, driver
        self.begun: dict[str, float] = {}

    def initialize(self, tasks: Any, selected: Any) -> None:
        self.total, self.count = len(tasks), 0

    def _line(self, text: str) -> None:
        self.out.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        self.out.flush()

    def execute_task(self, task: Any) -> None:
        self.begun[task.name] = time.monotonic()

    def add_success(self, task: Any) -> None:
        self.count += 1
        seconds = time.monotonic() - self.begun.get(task.name, time.monotonic())
        self._line(f"[{self.count}/{self.total}] {task.name.removeprefix('node-')}: done, {seconds:.0f} s")

    def add_failure(self, task: Any, fail: Any) -> None:
        self.count += 1
        if not self.driver.stopped:  # what was not begun then is no failure
            self._line(f"[{self.count}/{self.total}] {task.name.removeprefix('node-')}: {_state(fail)}")

    def skip_uptodate(self, task: Any) -> None:
        self.count += 1
        self._line(f"[{self.count}/{self.total}] {task.name.removeprefix('node-')}: was done")

    def get_status(self, task: Any) -> None: ...

    def skip_ignore(self, task: Any) -> None: ...

    def cleanup_error(self, exception: Any) -> None: ...

    def runtime_error(self, message: Any) -> None: ...

    def teardown_task(self, task: Any) -> None: ...

    def complete_run(self) -> None: ...


def _state(fail: Any) -> str:
    return "waits for what failed" if type(fail).__name__ == "UnmetDependency" else "not finished"
