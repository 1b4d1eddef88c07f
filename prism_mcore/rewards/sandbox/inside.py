"""The far side of the sandbox: what starts programs, what confines a process, and what runs one program.

The standard library alone, and nothing of ours: a bare interpreter (`python -I -S -c`) gets the text of this file, and
no environment. `starter` is a small process that forks one child per program; the child becomes bubblewrap, which
starts `runner` in a box, or confines itself and goes on as the runner. No expected output ever comes here.
"""

import json
import os
import resource
import sys
from types import ModuleType

READY = b"R"  # the runner's first byte: what ends after it is the program's doing, what ends before it is ours
FILTER_FD = 9
FILE_BYTES = 16 << 20
THREADS = 64
# LeetCode gives its solutions these names; problems that ask for a function are written for that.
PRELUDE = """
import bisect, collections, functools, heapq, itertools, math, operator, re, string
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import inf, gcd, sqrt, ceil, floor
from typing import *
"""

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38  # linux/prctl.h
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3  # linux/landlock.h


def landlock_version() -> int:
    """The kernel's Landlock ABI, 0 where there is none."""
    import ctypes

    return max(0, ctypes.CDLL(None).syscall(_CREATE_RULESET, None, 0, 1))


def landlock_ruleset(readable: list[str]) -> int:
    """A file descriptor of rules: these paths may be read, nothing written but /dev/null, no TCP, no signals out.

    Raises OSError where the kernel has no Landlock. Source: linux/landlock.h and the kernel's landlock documentation.
    """
    import ctypes

    libc, abi = ctypes.CDLL(None, use_errno=True), landlock_version()
    files = (1 << (13 + (abi >= 2) + (abi >= 3) + (abi >= 5))) - 1  # every right that this ABI knows
    words = [files, 3, 3][: 1 + (abi >= 4) + (abi >= 6)]  # files; TCP bind and connect; abstract sockets and signals
    ruleset = libc.syscall(_CREATE_RULESET, (ctypes.c_uint64 * len(words))(*words), ctypes.c_size_t(8 * len(words)), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "the kernel has no Landlock")
    for path in [*readable, "/dev/urandom", "/dev/null"]:
        if not os.path.exists(path):
            continue
        rights = _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0) | (_WRITE_FILE if path == "/dev/null" else 0)
        parent = os.open(path, os.O_PATH)
        rule = rights.to_bytes(8, sys.byteorder) + parent.to_bytes(4, sys.byteorder)
        added = libc.syscall(_ADD_RULE, ruleset, 1, rule, 0)
        os.close(parent)
        if added < 0:
            raise OSError(ctypes.get_errno(), f"Landlock takes no rule for {path}")
    return int(ruleset)


def confine(ruleset: int, seccomp: bytes) -> None:
    """Put this process under Landlock rules and a seccomp filter, for good. Raises OSError where the kernel refuses."""
    import ctypes

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    libc = ctypes.CDLL(None, use_errno=True)
    program = Program(len(seccomp) // 8, seccomp)
    for failed in (
        lambda: libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        lambda: libc.syscall(_RESTRICT_SELF, ruleset, 0),
        lambda: libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0),
    ):
        if failed():
            raise OSError(ctypes.get_errno(), "the kernel refuses to confine the process")
    os.close(ruleset)


def starter() -> None:
    """Fork a process per program until its socket closes; the argument is what Sandbox._open configures.

    {"seconds"} with two descriptors starts one and is answered with nothing but its start; {"end": seconds} waits that
    long for it, kills it and is answered with its exit code, null where it had to be killed.
    """
    import base64
    import select
    import signal
    import socket

    config = json.loads(sys.argv[2])
    _die_with(config["parent"])
    seccomp = base64.b64decode(config["seccomp"])
    first, count = config["users"]
    config["uid"] = first + os.getpid() % count
    ruleset = None if config["command"] else landlock_ruleset(config["readable"])
    if ruleset is not None:
        exec(PRELUDE, {})  # imported once, here
    control = socket.socket(fileno=config["control"])
    child, status = 0, None
    while True:
        message, fds, _, _ = socket.recv_fds(control, 1 << 16, 2)
        if not message:
            return
        request = json.loads(message)
        if "end" not in request:
            child = os.fork()
            if child == 0:
                control.detach()
                return _become(config, request["seconds"], fds, ruleset, seccomp)
            for fd in fds:
                os.close(fd)
            control.send(b"{}")
            continue
        watch = os.pidfd_open(child)
        ended = bool(select.select([watch], [], [], request["end"])[0])
        os.close(watch)
        if not ended:
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        control.send(json.dumps({"exit": status if ended else None}).encode())


def _become(config: dict, seconds: float, fds: list[int], ruleset: int | None, seccomp: bytes) -> None:
    """In the child: bubblewrap, or a confined process that runs the program."""
    try:
        null = os.open("/dev/null", os.O_WRONLY)
        for fd, place in zip([*fds, null], (0, 1, 2), strict=True):
            os.dup2(fd, place)
        if ruleset is None:
            out, into = os.pipe()
            os.write(into, seccomp)
            os.close(into)
            os.dup2(out, FILTER_FD)
        else:
            ruleset = os.dup2(ruleset, FILTER_FD, inheritable=False)
        os.closerange(3, FILTER_FD)
        os.closerange(FILTER_FD + 1, 256)
        parent = os.getppid()
        if config["uid"]:
            os.setgroups([])
            os.setresgid(config["uid"], config["uid"], config["uid"])
            os.setresuid(config["uid"], config["uid"], config["uid"])
        _die_with(parent)  # a change of user forgets it
        if ruleset is None:
            os.execve(config["command"][0], [*config["command"], str(seconds)], {})
        os.setsid()
        os.chdir("/")
        _limit(config["memory_mb"], seconds, file_bytes=0)
        confine(ruleset, seccomp)
    except BaseException:
        os._exit(126)  # without READY: the host knows that it was not the program
    run_and_exit()


def runner() -> None:
    """In bubblewrap's box; arguments: MiB and seconds of CPU time that the program may take."""
    _limit(int(sys.argv[2]), float(sys.argv[3]), FILE_BYTES)
    # Inside, because it counts a user's processes in this namespace: outside it would stop bubblewrap and neighbours.
    resource.setrlimit(resource.RLIMIT_NPROC, (THREADS, THREADS))
    run_and_exit()


def run_and_exit() -> None:
    """Run a program and exit as an interpreter does, but without taking itself apart, which takes longer than most."""
    import atexit

    code: object = 0
    try:
        run_program()
    except SystemExit as exit_:
        code = exit_.code or 0
    except BaseException:
        code = 1
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        code = code or 1
    os._exit(code & 255 if isinstance(code, int) else 1)


def run_program() -> None:
    """Read a length and {"program", "function"} from stdin, say READY, and run it as `__main__`; then answer its calls.

    Without a function the program has the rest of stdin, and stdout. With one its stdout goes nowhere, and each line of
    stdin, a list of arguments, is answered with a line {"value"} or {"error"}.
    """
    task = json.loads(_read(int(_read(8))))
    os.write(1, READY)
    main = ModuleType("__main__")
    sys.modules["__main__"], sys.argv = main, ["program.py"]
    main.__dict__.update(exit=sys.exit, quit=sys.exit)  # -S leaves them out
    if task["function"] is None:
        exec(compile(task["program"], "program.py", "exec"), main.__dict__)
        return
    answers = os.dup(1)
    os.dup2(2, 1)  # /dev/null
    exec(PRELUDE, main.__dict__)
    exec(compile(task["program"], "program.py", "exec"), main.__dict__)
    _answer_calls(main, task["function"], answers)


def _answer_calls(main: ModuleType, name: str, answers: int) -> None:
    calls = os.fdopen(os.dup(0), "rb")
    for line in calls:
        try:
            function = getattr(main, name) if hasattr(main, name) else getattr(main.Solution(), name)
            text = json.dumps({"value": function(*json.loads(line))}, default=_plain)
        except BaseException as error:
            text = json.dumps({"error": type(error).__name__})
        data = text.encode() + b"\n"
        while data:
            data = data[os.write(answers, data) :]


def _plain(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return list(value)  # type: ignore[call-overload]


def _limit(memory_mb: int, seconds: float, file_bytes: int) -> None:
    for what, most in (
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def _die_with(parent: int) -> None:
    import ctypes
    import signal

    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(_PR_SET_DUMPABLE, 0)
    if os.getppid() != parent:
        os._exit(1)


def _read(size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = os.read(0, size - len(data))
        if not piece:
            os._exit(126)
        data += piece
    return data


if __name__ == "__main__":
    {"starter": starter, "runner": runner}[sys.argv[1]]()
