"""A warm pool of processes that verify responses, each of which may hang, crash or eat memory and is then replaced."""

import contextlib
import json
import logging
import os
import queue
import selectors
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from prism_mcore import program
from prism_mcore.rewards.code import Limits
from prism_mcore.rewards.format import is_formatted, repeated_fraction
from prism_mcore.rewards.registry import REWARDS
from prism_mcore.rewards.settings import RewardSettings

log = logging.getLogger(__name__)

START_S = 120.0  # a worker may take this long to import its packages
MOST_FAILED_STARTS = 10  # in a row, after the first that was ready


@dataclass(frozen=True)
class Verdict:
    """`Verdict(7, "ok", {"correct": 1.0})`; status "timeout" or "crash" comes with no parts."""

    ticket: int
    status: str
    parts: Mapping[str, float] = field(default_factory=dict)
    extraction: tuple[str, str | None] = ("none", None)  # kind and answer, where an extractor was asked for


class _Task(NamedTuple):
    ticket: int
    seconds: float  # that it may take
    line: bytes


@dataclass
class _Worker:
    process: subprocess.Popen
    deadline: float  # of its start, or of what it works on
    ready: bool = False
    ticket: int | None = None  # of what it works on
    partial: bytes = b""


class Verifier:
    """`submit` a response as soon as it is finished, collect verdicts with `results`; closes its processes at the end.

    A thread hands out work and keeps the time, so that verification goes on while the caller generates. A response
    whose verification takes longer than timeout_s, or ends its process, gets a verdict that says so.
    rewards: the names that prompts use, whose packages the processes import before any work. A response that is a
    program has the time of `programs` on top; no more of them run at once than there are workers, the others wait.
    """

    def __init__(self, workers: int, timeout_s: float, rewards: Iterable[str] = (), programs: Limits | None = None):
        self.timeout_s, self.programs = timeout_s, programs or Limits()
        names = list(rewards)
        self.packages = sorted({REWARDS[name].package for name in names} - {""})
        self._arguments = list(self.packages)
        if any(REWARDS[name].runs_programs for name in names):
            self._arguments += ["--programs", json.dumps(asdict(self.programs))]
        self.outstanding = 0
        self._failure: BaseException | None = None
        self._started, self._failed_starts = False, 0
        self._waiting: deque[_Task] = deque()
        self._submitted: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._verdicts: queue.SimpleQueue[Verdict | None] = queue.SimpleQueue()
        self._wake_out, self._wake_in = os.pipe()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        self._workers = [self._start() for _ in range(workers)]
        self._thread = threading.Thread(target=self._work, name="verifier", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, ticket: int, record: Mapping[str, Any], response: str, extractor: str = "") -> None:
        """Verify a response by record["reward"]; its verdict will carry the ticket, which must be of no other.

        extractor: one of extraction.py, by whose answer the response is graded.
        """
        task = {"ticket": ticket, "reward": record["reward"], "record": dict(record), "response": response}
        if extractor:
            task["extractor"] = extractor
        if self._failure is not None:
            raise RuntimeError("the verifier has stopped") from self._failure
        self.outstanding += 1
        seconds = self.timeout_s + (self.programs.program_s if REWARDS[record["reward"]].runs_programs else 0.0)
        self._submitted.put(_Task(ticket, seconds, json.dumps(task).encode() + b"\n"))
        self._wake()

    def results(self, block: bool = False, on_wait: Callable[[], object] = lambda: None) -> list[Verdict]:
        """Verdicts that are there; with `block`, all those still outstanding, `on_wait` called every second."""
        found = []
        while self.outstanding:
            try:
                verdict = self._verdicts.get(block, timeout=1.0)
            except queue.Empty:
                if not block:
                    break
                on_wait()
                continue
            if verdict is None:
                self._verdicts.put(None)  # for whoever asks again
                raise RuntimeError("the verifier has stopped") from self._failure
            found.append(verdict)
            self.outstanding -= 1
        return found

    def close(self) -> None:
        """End every process; nothing can be submitted any more."""
        if self._thread.is_alive():
            self._submitted.put(None)
            self._wake()
            self._thread.join()
            os.close(self._wake_in)

    def _wake(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # the thread has stopped just now; `results` says why
            os.write(self._wake_in, b".")

    # The rest runs in the thread.

    def _work(self) -> None:
        try:
            while self._take_submitted():
                self._hand_out()
                for key, _ in self._selector.select(self._patience()):
                    if key.data is None:
                        os.read(self._wake_out, 1 << 16)
                    else:
                        self._read(key.data)
                self._end_late()
        except BaseException as failure:
            self._failure = failure
        finally:
            self._verdicts.put(None)
            for worker in self._workers:
                self._stop(worker)
            self._selector.close()
            os.close(self._wake_out)

    def _take_submitted(self) -> bool:
        while True:
            try:
                task = self._submitted.get_nowait()
            except queue.Empty:
                return True
            if task is None:
                return False
            self._waiting.append(task)

    def _hand_out(self) -> None:
        for worker in self._workers:
            if worker.ready and worker.ticket is None and self._waiting:
                worker.ticket, seconds, line = self._waiting.popleft()
                worker.deadline = time.monotonic() + seconds
                assert worker.process.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # its end shows when it is read from
                    worker.process.stdin.write(line)
                    worker.process.stdin.flush()

    def _patience(self) -> float | None:
        deadlines = [worker.deadline for worker in self._workers if worker.ticket is not None or not worker.ready]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _read(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        data = os.read(worker.process.stdout.fileno(), 1 << 16)
        if not data:
            return self._lose(worker, "crash")
        worker.partial += data
        while b"\n" in worker.partial:
            line, worker.partial = worker.partial.split(b"\n", 1)
            if line:
                self._answer(json.loads(line))
            worker.ready, worker.ticket = True, None
            self._started, self._failed_starts = True, 0

    def _answer(self, answer: dict[str, Any]) -> None:
        if answer["error"]:
            log.warning("a verifier failed on a response, which is masked: %s", answer["error"])
        self._verdicts.put(
            Verdict(
                answer["ticket"], answer["status"], answer["parts"], tuple(answer.get("extraction", ("none", None)))
            )
        )

    def _end_late(self) -> None:
        for worker in list(self._workers):
            if (worker.ticket is not None or not worker.ready) and time.monotonic() > worker.deadline:
                self._lose(worker, "timeout")

    def _lose(self, worker: _Worker, status: str) -> None:
        self._stop(worker)
        if not worker.ready:
            self._count_failed_start()
        if worker.ticket is not None:
            self._verdicts.put(Verdict(worker.ticket, status))
        self._workers[self._workers.index(worker)] = self._start()

    def _count_failed_start(self) -> None:
        self._failed_starts += 1
        if not self._started or self._failed_starts > MOST_FAILED_STARTS:
            packages, arguments = " ".join(self.packages), shlex.join(self._arguments)
            raise RuntimeError(
                f"a verifier process was not ready after {START_S:.0f} s, or ended before; to see why, run `python -m"
                f" prism_mcore.rewards.worker {arguments}`; to install {packages}: pip install 'prism_mcore[rl]'"
            )

    def _start(self) -> _Worker:
        process = subprocess.Popen(
            [sys.executable, "-m", "prism_mcore.rewards.worker", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=program.environment(),
            start_new_session=True,  # Ctrl-C is for the run, which then ends these
        )
        worker = _Worker(process, time.monotonic() + START_S)
        assert process.stdout is not None
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        return worker

    def _stop(self, worker: _Worker) -> None:
        process = worker.process
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(process.stdout)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()


def reward_parts(
    verdict: Verdict, response: str, tokens: tuple[int, ...], stop_token: bool, settings: RewardSettings
) -> dict[str, float]:
    """The parts whose sum is a response's reward: what its verdict says, the format rule, and the penalties.

    {"correct": 1.0, "stop_token": 0.0, "repetition": -0.02}. Source: PRISM, arXiv 2603.17074, appendix D; it does not
    give the size of its penalties. The repetition penalty is proportional, as in arXiv 2502.03373.
    """
    counts = not settings.require_think or is_formatted(response)
    parts = {name: value if counts else 0.0 for name, value in verdict.parts.items()}
    if settings.stop_token_penalty:
        parts["stop_token"] = 0.0 if stop_token else -settings.stop_token_penalty
    if settings.repetition_penalty:
        parts["repetition"] = -settings.repetition_penalty * repeated_fraction(tokens, settings.repetition_ngram)
    return parts
