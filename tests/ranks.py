"""A pool of gloo ranks for tests: `from ranks import run_ranks` (tests/conftest.py puts this folder on sys.path).

    def sum_of_ranks(groups, start):            # a module-level function of the test file
        value = torch.tensor(start + groups.rank)
        torch.distributed.all_reduce(value)
        return value

    def test_sum():
        assert run_ranks(2, sum_of_ranks, 10, tp=2) == [21, 21]

The processes of a world size are started once per session and reused. They are forked from one server process that has
imported torch and megatron-core once, because that import takes seconds.
"""

import gc
import importlib.util
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT_S = 120.0
GRACE_S = 5.0  # after one rank failed, the others get this long to notice and report

_pools: dict[int, "_Pool"] = {}


class RankError(RuntimeError):
    """At least one rank failed. `reports` maps each failed rank to its traceback or to what happened to it."""

    def __init__(self, reports: dict[int, str]):
        self.reports = reports
        super().__init__("\n".join(f"--- rank {rank}: {text}" for rank, text in sorted(reports.items())))


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S, **layout: Any
) -> list[Any]:
    """Run `function(groups, *args)` on every rank and return each rank's result, in rank order.

    function: defined at the top level of a module; args and results are pickled (tensors are fine). layout: fields of
    ParallelSettings (tp=2, pp=2, ...); the groups are made before and destroyed after the call, the seed is 0.
    Raises RankError when a rank raises, dies, or takes longer than timeout_s.
    """
    if world_size not in _pools:
        _pools[world_size] = _Pool(world_size)
    pool = _pools[world_size]
    try:
        return pool.run(_Call(function, args, layout), timeout_s)
    finally:
        if not pool.usable:
            pool.close()
            del _pools[world_size]


def close_pools() -> None:
    """Stop every rank process."""
    while _pools:
        _pools.popitem()[1].close()


class _Call:
    """What is sent to a rank: the function by file and name, because a rank does not have pytest's module table."""

    def __init__(self, function: Callable[..., Any], args: tuple, layout: dict[str, Any]):
        self.module = function.__module__
        self.file = function.__code__.co_filename
        self.name = function.__qualname__
        self.args = pickle.dumps(args)
        self.layout = layout
        self.path = list(sys.path)

    def run(self) -> Any:
        from prism_mcore.parallel import ParallelSettings, destroy_groups, init_groups

        sys.path[:] = self.path
        function = getattr(_load(self.module, self.file), self.name)
        try:
            return function(init_groups(ParallelSettings(**self.layout)), *pickle.loads(self.args))
        finally:
            destroy_groups()
            gc.collect()


class _Pool:
    """The processes of one world size; `usable` turns False when they can no longer be trusted to be in step."""

    def __init__(self, world_size: int):
        self.usable = True
        self.logs = tempfile.TemporaryDirectory(prefix="ranks-")
        context = _fork_server()
        port = _free_port()
        pipes = [context.Pipe() for _ in range(world_size)]
        self.connections = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, world_size, port, theirs, self._log(rank)))
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def run(self, call: _Call, timeout_s: float) -> list[Any]:
        message = pickle.dumps(call)
        answers: dict[int, tuple[bool, Any]] = {}
        for rank, connection in enumerate(self.connections):
            try:
                connection.send_bytes(message)
            except OSError:
                answers[rank] = (False, self._obituary(rank))
        deadline, patience = time.monotonic() + timeout_s, f"within {timeout_s:g} s"
        graced = False
        while len(answers) < len(self.connections) and time.monotonic() < deadline:
            self._collect(answers, deadline - time.monotonic())
            if not graced and any(not good for good, _ in answers.values()):
                graced, patience = True, f"within {GRACE_S:g} s of another rank's failure"
                deadline = min(deadline, time.monotonic() + GRACE_S)
        for rank in range(len(self.connections)):
            answers.setdefault(rank, (False, f"did not answer {patience}{self._log_tail(rank)}"))
        failures = {rank: answer for rank, (good, answer) in answers.items() if not good}
        if failures:
            # Ranks that all raised the same kind of error are still in step; anything else needs new processes.
            self.usable = len(failures) == len(answers) and all(
                text.startswith("Traceback") for text in failures.values()
            )
            raise RankError(failures)
        return [answers[rank][1] for rank in range(len(answers))]

    def _collect(self, answers: dict[int, tuple[bool, Any]], wait_s: float) -> None:
        waiting = {connection: rank for rank, connection in enumerate(self.connections) if rank not in answers}
        for connection in wait(list(waiting), max(0.0, wait_s)):
            assert isinstance(connection, Connection)
            rank = waiting[connection]
            try:
                answers[rank] = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError):
                answers[rank] = (False, self._obituary(rank))

    def _obituary(self, rank: int) -> str:
        self.processes[rank].join(5)
        code = self.processes[rank].exitcode
        cause = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return f"died: {cause}{self._log_tail(rank)}"

    def _log(self, rank: int) -> str:
        return os.path.join(self.logs.name, f"{rank}.log")

    def _log_tail(self, rank: int) -> str:
        with open(self._log(rank), errors="replace") as log:
            text = log.read()[-4000:].strip()
        return f"\nits last output:\n{text}" if text else ""

    def close(self) -> None:
        for connection in self.connections:
            connection.close()  # an idle rank ends when its connection does
        for process in self.processes:
            process.join(2 if self.usable else 0)
            if process.is_alive():
                process.kill()
                process.join()
        self.logs.cleanup()


def _fork_server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["prism_mcore.parallel", "megatron.core.optimizer", "megatron.core.pipeline_parallel"]
    )
    before = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")  # the server and its ranks keep these
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)
    return context


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _serve(rank: int, world_size: int, port: int, connection: Connection, log: str) -> None:
    """A rank's life: answer calls until the connection closes."""
    _redirect_output(log)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    from prism_mcore import platform

    platform.start(threads=1)
    gc.freeze()  # what torch and megatron-core imported stays; collecting after each call then takes no time
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)  # the test session is over: nobody is left to close groups with
        connection.send_bytes(_answer(message))
        torch.set_num_threads(1)  # a whole run in a test takes as many as there are cores


def _answer(message: bytes) -> bytes:
    try:
        return pickle.dumps((True, pickle.loads(message).run()))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))


def _redirect_output(log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def _load(module: str, file: str) -> Any:
    """The test module, under the name it has in the test session, so that its classes can be pickled both ways."""
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None and spec.loader is not None, f"{file} cannot be imported"
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return sys.modules[module]
