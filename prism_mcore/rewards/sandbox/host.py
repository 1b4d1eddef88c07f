"""This side of the sandbox: which recipe holds here, and programs run under it, one at a time."""

import base64
import contextlib
import functools
import json
import os
import platform
import selectors
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_mcore.rewards.sandbox import inside
from prism_mcore.rewards.sandbox.filter import seccomp_filter
from prism_mcore.rewards.sandbox.probe import PROBE

OUTPUT_BYTES = 4 << 20
START_S = 20.0  # most that starting a program may take; longer is the machine's fault
_END_S = 2.0  # a program that closed its output may take this long to end, its box with it
_MANY_USERS = 0x70000000  # + a process id: a user of nobody else
INSTALL = (
    "install bubblewrap and libseccomp (apt-get install bubblewrap libseccomp2 python3) where users may make"
    " namespaces, or run on a kernel with Landlock (5.13 or newer)"
)


class SandboxError(Exception):
    """The sandbox failed, not the program in it."""


@dataclass(frozen=True)
class Outcome:
    """`Outcome("ok", b"3\\n")`. Status: ok, failed (an exit code or an end of its own), timeout, output (too much)."""

    status: str
    stdout: bytes = b""
    seconds: float = 0.0  # of wall time, its start left out


@dataclass(frozen=True)
class Returned:
    """`Returned("ok", [1, 2])`: what a call returned; status as Outcome's, `failed` also where it raised."""

    status: str
    value: Any = None


class Sandbox:
    """Runs one program at a time, confined; closes its processes at the end.

    recipe: "bubblewrap", a box of namespaces of its own, "landlock", a confined process without, or "" for the first
    of the two that holds here. Raises SandboxError, with what to install, where none does: it tries at once to fork, to
    take shared memory and memfds, to reach the network, files and the environment from inside. docs/add-a-reward.md.
    """

    def __init__(self, memory_mb: int = 512, recipe: str = ""):
        self.memory_mb = memory_mb
        problems = []
        for self.recipe in [recipe] if recipe else ["bubblewrap", "landlock"]:
            try:
                return self._open()
            except (OSError, SandboxError) as error:
                self.close()
                problems.append(f"{self.recipe}: {error}")
        raise SandboxError(f"no sandbox holds on this machine; {INSTALL}. {'; '.join(problems)}")

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process of it."""
        if starter := self.__dict__.pop("_starter", None):
            self._control.close()  # which ends it, and the kernel then what it started
            starter.wait()

    def run(self, program: str, stdin: bytes, seconds: float) -> Outcome:
        """Run a program with this stdin; it has `seconds` of wall time. Raises SandboxError where it never began."""
        with self._started(program, None, seconds) as box:
            begun = time.monotonic()
            status, out = box.exchange(stdin, seconds, until_line=False)
            taken = time.monotonic() - begun
        return Outcome("ok" if status == "end" and box.exit_code == 0 else _ENDED.get(status, status), out, taken)

    def call(
        self, program: str, name: str, calls: Sequence[list[Any]], seconds: float, total_s: float
    ) -> list[Returned]:
        """What the program's function (or class Solution's method) returns for each list of arguments.

        A call has `seconds`, all together total_s; after one that took too long, or ended the process, the program is
        started again for the rest. Raises SandboxError where it was not started.
        """
        returned: list[Returned] = []
        deadline = time.monotonic() + total_s
        while len(returned) < len(calls) and time.monotonic() < deadline:
            with self._started(program, name, total_s) as box:
                for arguments in calls[len(returned) :]:
                    left = min(seconds, deadline - time.monotonic())
                    status, out = box.exchange(json.dumps(arguments).encode() + b"\n", left, until_line=True)
                    returned.append(_answer(out) if status == "line" else Returned(_ENDED.get(status, status)))
                    if status != "line":
                        break
        return returned + [Returned("timeout")] * (len(calls) - len(returned))

    # How a program is started and ended.

    @contextlib.contextmanager
    def _started(self, program: str, function: str | None, seconds: float) -> Iterator["_Box"]:
        stdin_out, stdin = os.pipe()
        stdout, stdout_in = os.pipe()
        box = _Box(stdin, stdout)
        try:
            self._ask({"seconds": seconds}, [stdin_out, stdout_in])
        finally:
            os.close(stdin_out)
            os.close(stdout_in)
        try:
            task = json.dumps({"program": program, "function": function}).encode()
            box.begin(b"%08d" % len(task) + task)
            yield box
        finally:
            box.close()
            box.exit_code = self._ask({"end": _END_S if box.ended else 0})["exit"]

    def _ask(self, request: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        try:
            socket.send_fds(self._control, [json.dumps(request).encode()], fds)
            answer = self._control.recv(1 << 16)
        except OSError as error:
            raise SandboxError(f"the process that starts programs does not answer: {error}") from error
        if not answer:
            raise SandboxError("the process that starts programs has ended")
        return json.loads(answer)

    def _open(self) -> None:
        if self.recipe == "landlock" and not inside.landlock_version():
            raise SandboxError(f"the kernel ({platform.release()}) has no Landlock, or forbids its use")
        python = interpreter()
        self._control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(START_S)
        configuration = {
            "parent": os.getpid(),
            "control": other.fileno(),
            "command": self._bubblewrap(python) if self.recipe == "bubblewrap" else None,
            "readable": readable(python),
            "seccomp": base64.b64encode(seccomp_filter()).decode(),
            "memory_mb": self.memory_mb,
            "users": _users(),
        }
        with other:
            self._starter = subprocess.Popen(
                [*_bare(python), _source(), "starter", json.dumps(configuration)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                pass_fds=[other.fileno()],
                start_new_session=True,  # Ctrl-C is for the run, which then ends it
            )
        (found,) = self.call(PROBE, "probe", [[]], START_S, START_S)
        if found.status != "ok":
            raise SandboxError(f"its self-test ended with {found.status}")
        if allowed := [what for what, done in found.value.items() if done]:
            raise SandboxError(f"its self-test could do what it must not: {', '.join(allowed)}")

    def _bubblewrap(self, python: str) -> list[str]:
        """The command that makes the box, up to the seconds of CPU time, which each program has of its own."""
        program = shutil.which("bwrap", path=os.environ.get("PATH", "") + ":/usr/bin:/usr/local/bin")
        if program is None:
            raise SandboxError("bubblewrap (bwrap) is not installed")
        prefix = str(Path(python).parent.parent)
        shared = [] if prefix == "/usr" else ["--ro-bind", prefix, prefix]
        libraries = [part for name in ("lib", "lib64") if os.path.exists(f"/{name}") for part in _library(name)]
        return [
            *(program, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"),
            *("--clearenv", "--setenv", "PATH", "/usr/bin", "--cap-drop", "ALL", "--hostname", "box"),
            *("--ro-bind", "/usr", "/usr", *libraries, *shared, "--proc", "/proc", "--dev", "/dev"),
            *("--size", str(16 << 20), "--tmpfs", "/dev/shm", "--size", str(64 << 20), "--tmpfs", "/tmp"),
            *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--seccomp", str(inside.FILTER_FD)),
            *(*_bare(python), _source(), "runner", str(self.memory_mb)),
        ]


class _Box:
    """The two pipes of a program that was started."""

    exit_code: int | None = None
    ended = False  # has closed its output

    def __init__(self, stdin: int, stdout: int):
        self.stdin, self.stdout = stdin, stdout
        os.set_blocking(stdin, False)
        os.set_blocking(stdout, False)
        self._over = b""  # read, and not yet of an answer

    def close(self) -> None:
        for name in ("stdin", "stdout"):
            if (fd := self.__dict__.pop(name, None)) is not None:
                os.close(fd)

    def begin(self, task: bytes) -> None:
        """Send the task and wait until the program is about to run."""
        status, out = self._pump(task, START_S, lambda out: bool(out), keep_open=True)
        if not out.startswith(inside.READY):
            raise SandboxError(f"a program was not started: {status}")
        self._over = out[len(inside.READY) :]

    def exchange(self, data: bytes, seconds: float, until_line: bool) -> tuple[str, bytes]:
        """Send data and read a line, or all until the end: ("line" | "end" | "timeout" | "output", what was read)."""
        status, out = self._pump(data, seconds, lambda out: until_line and b"\n" in out, keep_open=until_line)
        if status == "enough":
            line, _, self._over = out.partition(b"\n")
            return "line", line
        return status, out

    def _pump(
        self, data: bytes, seconds: float, enough: Callable[[bytearray], bool], keep_open: bool
    ) -> tuple[str, bytes]:
        deadline, out, self._over = time.monotonic() + seconds, bytearray(self._over), b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.stdout, selectors.EVENT_READ)
            if data:
                selector.register(self.stdin, selectors.EVENT_WRITE)
            elif not keep_open:
                self._close_stdin()
            while not enough(out):
                if len(out) > OUTPUT_BYTES:
                    return "output", bytes(out[:OUTPUT_BYTES])
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if time.monotonic() >= deadline:
                    return "timeout", bytes(out)
                for key, _ in ready:
                    if key.fd == self.stdout:
                        if not (piece := os.read(self.stdout, 1 << 16)):
                            self.ended = True
                            return "end", bytes(out)
                        out += piece
                        continue
                    try:
                        data = data[os.write(self.stdin, data[: 1 << 16]) :]
                    except BrokenPipeError:  # it need not read all
                        data = b""
                    if not data:
                        selector.unregister(self.stdin)
                        if not keep_open:
                            self._close_stdin()
        return "enough", bytes(out)

    def _close_stdin(self) -> None:
        os.close(self.__dict__.pop("stdin"))


_ENDED = {"end": "failed"}


def _answer(line: bytes) -> Returned:
    try:
        answer = json.loads(line)
        return Returned("ok", answer["value"]) if "value" in answer else Returned("failed")
    except (ValueError, RecursionError, TypeError):  # the program wrote it, not the runner
        return Returned("failed")


@functools.cache
def interpreter() -> str:
    """A Python that whoever runs in the sandbox can read: this one, or the system's. SandboxError without any."""
    names = [f"{sys.base_prefix}/bin/python3", "/usr/bin/python3", "/usr/local/bin/python3"]
    for name in names:
        path = Path(name).resolve()
        if path.exists() and (os.getuid() or all(place.stat().st_mode & 0o005 for place in [path, *path.parents])):
            version = subprocess.run(
                [*_bare(str(path)), "import sys; print(sys.version_info >= (3, 10))"], capture_output=True
            )
            if version.stdout.strip() == b"True":
                return str(path)
    raise SandboxError(
        f"no Python from 3.10 on that another user can read ({', '.join(names)}): apt-get install python3"
    )


def readable(python: str) -> list[str]:
    """What a confined program may read: the interpreter's library and shared objects."""
    return [f"{Path(python).parent.parent}/lib", "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo"]


def confine_self() -> bool:
    """Confine this process as "landlock" does a program, for good: it reads Python's files. False where it cannot."""
    roots = {sys.prefix, sys.base_prefix, *sys.path, *readable(sys.executable)} - {""}
    try:
        inside.confine(inside.landlock_ruleset(sorted(roots)), seccomp_filter())
    except OSError:
        return False
    return True


def _bare(python: str) -> list[str]:
    return [python, "-I", "-S", "-X", "utf8", "-c"]


@functools.cache
def _source() -> str:
    return Path(inside.__file__).read_text(encoding="utf-8")


def _library(name: str) -> list[str]:
    link = Path("/", name)
    return ["--symlink", f"usr/{name}", str(link)] if link.is_symlink() else ["--ro-bind", str(link), str(link)]


def _users() -> tuple[int, int]:
    """(first, count): as root a program becomes the one its starter's process id picks; (0, 1): it stays as we are.

    One per slot: a user's processes may look at and signal each other. Raises SandboxError where root has no others.
    """
    if os.getuid():
        return 0, 1
    lines = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    mapped = max(int(first) + int(count) for first, _, count in lines)
    if mapped > _MANY_USERS + (1 << 22):
        return _MANY_USERS, 1 << 22
    if mapped < 65000:
        raise SandboxError("root of a user namespace without other users: run as an ordinary user")
    return 60000, 5000
