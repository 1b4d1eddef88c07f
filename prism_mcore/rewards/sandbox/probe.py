"""What a sandbox tries from inside before it is used: everything here must fail."""

# A program as a model would write it: `probe` says what it could do. Numbers are of x86_64's and aarch64's tables.
PROBE = """
import ctypes, os, platform, socket

libc = ctypes.CDLL(None, use_errno=True)
ARM = platform.machine() == "aarch64"


def many():
    if os.fork() == 0:
        os._exit(0)


def read(*paths):
    for path in paths:
        with open(path, "rb") as file:
            if file.read(1):
                return True
    return False


def call(x86, arm, *arguments):
    if libc.syscall(arm if ARM else x86, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")


TRIED = {
    "fork": many,
    "start a program": lambda: os.posix_spawn("/usr/bin/env", ["env"], {}),
    "SysV shared memory": lambda: call(29, 194, 0, 1 << 20, 0o1600),
    "memfd": lambda: os.memfd_create("x"),
    "a socket": lambda: socket.socket(),
    "a namespace": lambda: call(272, 97, 0x10000000),
    "keyrings": lambda: call(250, 219, 0, -3, 1),
    "ptrace": lambda: call(101, 117, 16, os.getppid(), 0, 0),
    "a signal to its parent": lambda: os.kill(os.getppid(), 0),
    "a change of its limits' owner": lambda: call(302, 261, os.getppid(), 7, 0, 0),
    "files of the machine": lambda: read("/etc/passwd"),
}


def probe():
    found = {}
    for what, attempt in TRIED.items():
        try:
            found[what] = attempt() is not False
        except OSError:
            found[what] = False
    try:
        found["the environment of the process above it"] = read("/proc/1/environ")
    except OSError:
        pass
    found["environment variables"] = len(set(os.environ) - {"PATH", "PWD", "LC_CTYPE"}) > 0
    return found
"""
