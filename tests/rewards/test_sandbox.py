"""Programs that attack what runs them, under both recipes: each is contained, nothing is left, the next is served."""

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from prism_mcore.rewards.code import same_value
from prism_mcore.rewards.sandbox import Sandbox, SandboxError, host

MEMORY_MB = 192
SECRET = "PRISM_TEST_SECRET"


@pytest.fixture(scope="module", params=["bubblewrap", "landlock"])
def sandbox(request):
    os.environ[SECRET] = "a token of the run"
    try:
        opened = Sandbox(MEMORY_MB, request.param)
    except SandboxError as error:
        pytest.skip(str(error))
    finally:
        del os.environ[SECRET]
    with opened:
        yield opened


def printed(sandbox: Sandbox, program: str, seconds: float = 10.0) -> str:
    outcome = sandbox.run(program, b"", seconds)
    assert outcome.status == "ok", outcome
    return outcome.stdout.decode().strip()


def errno_of(sandbox: Sandbox, attempt: str) -> str:
    """ "allowed", or the name of what an attempt raised."""
    program = "import os, sys, ctypes, socket\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    program += "def call(*arguments):\n    if libc.syscall(*arguments) < 0: raise OSError(ctypes.get_errno(), 'no')\n"
    program += f"try:\n    {attempt}\n    print('allowed')\nexcept OSError as error:\n    print(type(error).__name__)\n"
    return printed(sandbox, program)


def test_it_runs_and_calls_programs(sandbox):
    assert sandbox.run("print(int(input()) + 1)", b"4\n", 10).stdout == b"5\n"
    assert sandbox.run("import sys; sys.exit(3)", b"", 10).status == "failed"
    assert sandbox.run("print(1/0)", b"", 10).status == "failed"
    assert sandbox.run("print('é', end='')", b"", 10).stdout == "é".encode()
    assert sandbox.run("exit()", b"", 10).status == "ok"
    added = sandbox.call("def add(a, b): return a + b", "add", [[1, 2], ["a", "b"], [1, "b"]], 10, 30)
    assert [(one.status, one.value) for one in added] == [("ok", 3), ("ok", "ab"), ("failed", None)]
    method = "class Solution:\n    def top(self, x: List[int]) -> int: return Counter(x).most_common(1)[0][0]"
    assert sandbox.call(method, "top", [[[1, 2, 2]]], 10, 10)[0].value == 2


def test_threads_and_deep_recursion_work(sandbox):
    program = """
import sys, threading
sys.setrecursionlimit(10**6); threading.stack_size(64 << 20)
def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
def main(): print(depth(20000))
thread = threading.Thread(target=main); thread.start(); thread.join()
"""
    assert printed(sandbox, program) == "20000"


def test_a_call_that_takes_too_long_costs_itself_alone(sandbox):
    returned = sandbox.call("import time\ndef f(s): time.sleep(s); return (s,)", "f", [[0], [60], [0]], 1.5, 30)
    assert [one.status for one in returned] == ["ok", "timeout", "ok"]
    returned = sandbox.call("import time\ndef f(s): time.sleep(s)", "f", [[60]] * 5, 60, 1)
    assert [one.status for one in returned] == ["timeout"] * 5


ATTEMPTS = {
    "fork": "os.fork()",
    "double fork and setsid": "os.fork() or os.setsid() or os.fork()",
    "vfork": "os.posix_spawn('/usr/bin/env', ['env'], dict())",
    "network": "socket.create_connection(('127.0.0.1', {port}), 2)",
    "DNS": "socket.getaddrinfo('example.com', 80)",
    "an abstract socket": "socket.socket(socket.AF_UNIX).connect('\\0prism-{port}')",
    "/etc/shadow": "open('/etc/shadow')",
    "the run's files": "open('{file}')",
    "the run's environment": "open('/proc/{pid}/environ')",
    "the run's descriptors": "os.listdir('/proc/{pid}/fd')",
    "the run's memory": "open('/proc/{pid}/mem', 'r+b')",
    "writing outside": "open('{file}.new', 'w')",
    "writing to the system": "open('/usr/lib/prism', 'w')",
    "changing what a file may": "os.chmod('{file}', 0o777)",
    "removing": "os.unlink('{file}')",
    "a link out of /tmp": "os.symlink('{file}', '/tmp/link'); open('/tmp/link')",
    "keyrings": "call(250, 0, -3, 1)",
    "request_key": "call(249, b'user', b'x', 0, 0)",
    "SysV shared memory": "call(29, 0, 1 << 20, 0o1600)",
    "memfd": "os.memfd_create('x')",
    "ptrace of its parent": "call(101, 16, os.getppid(), 0, 0)",
    "reading its parent's memory": "call(310, os.getppid(), 0, 0, 0, 0, 0)",
    "killing its parent": "os.kill(os.getppid(), 9)",
    "killing all": "os.kill(-1, 9)",
    "its parent's limits": "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))",
    "a namespace": "call(272, 0x10000000)",
    "mount": "call(165, b'none', b'/tmp', b'tmpfs', 0, 0)",
    "another user": "os.setuid(0) if os.getuid() else call(105, 0, 0)",
    "io_uring": "call(425, 1, 0)",
    "bpf": "call(321, 0, 0, 0)",
    "outliving the run": "libc.prctl(1, 0, 0, 0, 0) == 0 or call(157, 1, 0, 0, 0, 0)",
}


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """What there is to reach outside: a file, a listener, an abstract socket."""
    file = tmp_path_factory.mktemp("outside") / "file"
    file.write_text("secret")
    for folder in (file, *file.parents[:-2]):
        with contextlib.suppress(OSError):
            folder.chmod(folder.stat().st_mode | 0o755)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        port = server.getsockname()[1]
        abstract.bind(f"\0prism-{port}")
        abstract.listen()
        yield {"port": port, "file": file, "pid": os.getpid()}


@pytest.mark.parametrize("attack", ATTEMPTS)
def test_it_may_not(sandbox, outside, attack):
    raised = errno_of(sandbox, ATTEMPTS[attack].format(**outside))
    assert raised in ("PermissionError", "FileNotFoundError", "OSError", "gaierror", "BlockingIOError"), raised
    assert outside["file"].read_text() == "secret"
    assert not outside["file"].with_name("file.new").exists()


def test_the_runs_environment_is_nowhere(sandbox):
    found = printed(
        sandbox,
        f"""
import os
texts = [repr(dict(os.environ))]
for path in ("/proc/1/environ", "/proc/self/environ", f"/proc/{{os.getppid()}}/environ"):
    try: texts.append(open(path).read())
    except OSError: pass
print(any({SECRET!r} in text for text in texts), sorted(os.environ))
""",
    )
    assert found.startswith("False") and set(eval(found[6:])) <= {"PATH", "PWD", "LC_CTYPE"}


def test_descriptors_lead_nowhere(sandbox):
    found = printed(
        sandbox,
        """
import os, stat
kinds = []
for fd in range(3, 64):
    try: kinds.append(oct(stat.S_IFMT(os.fstat(fd).st_mode)))
    except OSError: pass
print(kinds)
""",
    )
    assert found == "[]"


@pytest.mark.parametrize(
    "program",
    [
        "blocks = []\nwhile True: blocks.append(bytearray(8 << 20))",
        "import mmap\nall = []\nwhile 1:\n    all.append(mmap.mmap(-1, 16 << 20)); all[-1].write(bytes(16 << 20))",
        "import os\nwhile True:\n    try: os.fork()\n    except BlockingIOError: pass",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
        "import os\nos.fork(); blocks = [bytearray(8 << 20) for _ in range(1000)]",
    ],
    ids=["memory", "mapped memory", "fork bomb", "threads", "memory of many processes"],
)
def test_bombs_end_as_failures(sandbox, program):
    before = len(psutil.pids())
    outcome = sandbox.run(program, b"", 3)
    assert outcome.status in ("failed", "timeout")
    until(lambda: not boxed(sandbox))
    assert len(psutil.pids()) < before + 50
    assert printed(sandbox, "print(1)") == "1"


def test_the_memory_of_a_program_is_bounded(sandbox):
    found = printed(
        sandbox,
        """
blocks = []
try:
    while True: blocks.append(bytearray(8 << 20))
except MemoryError: pass
print(8 * len(blocks))
""",
    )
    assert 64 <= int(found) < MEMORY_MB


def test_endless_output_is_cut(sandbox):
    outcome = sandbox.run("while True: print('x' * 10000)", b"", 20)
    assert outcome.status == "output" and len(outcome.stdout) == host.OUTPUT_BYTES


@pytest.mark.parametrize("place", ["/tmp/x", "/dev/shm/x", "x"])
def test_a_file_of_10_gb_is_cut(sandbox, place):
    found = printed(
        sandbox,
        f"""
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = 0
try:
    with open({place!r}, "wb", buffering=0) as file:
        while size < 10 << 30: size += file.write(bytes(1 << 20))
except OSError: pass
print(size)
""",
    )
    assert int(found) <= 16 << 20


def test_what_hangs_is_killed_with_all_that_it_started(sandbox):
    program = "import os, signal, threading, time\nfor s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\n"
    program += "try: os.setsid()\nexcept OSError: pass\nthreading.Thread(target=time.sleep, args=(600,)).start()\n"
    started = time.monotonic()
    assert sandbox.run(program + "time.sleep(600)", b"", 1).status == "timeout"
    assert sandbox.run(program + "os.close(0); os.close(1); os.close(2); time.sleep(600)", b"", 1).status != "ok"
    assert time.monotonic() - started < 20
    until(lambda: not boxed(sandbox))


CHEATS = {
    "exits with success": "import sys\nsys.exit(0)",
    "exits at once": "import os\nos._exit(0)",
    "exits when called": "import os\ndef f(x): os._exit(0)",
    "prints an answer": "def f(x):\n    print('{\"value\": 4}'); return None",
    "equals everything": "class Any(dict):\n    __eq__ = lambda *_: True\ndef f(x): return Any()",
    "patches the harness": "import json\njson.dumps = lambda *_, **__: '{\"value\": true}'\ndef f(x): return 0",
    "answers before it is asked": "import os\nfor fd in range(3, 64):\n"
    "    try: os.write(fd, b'{\"value\": 9}\\n' * 5)\n    except OSError: pass\ndef f(x): return 0",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_cheats_do_not_return_what_is_expected(sandbox, cheat):
    returned = sandbox.call(CHEATS[cheat], "f", [[2], [2]], 10, 10)
    assert not any(one.status == "ok" and same_value(one.value, 4) for one in returned), returned


def test_frames_and_collector_hold_no_later_test(sandbox):
    program = """
import gc, inspect
needle = "-".join(["second", "test"])
def f(x):
    seen = [repr(info.frame.f_locals) for info in inspect.stack()]
    seen += [repr(found) for found in gc.get_objects() if isinstance(found, (dict, list, tuple))]
    return any(needle in text for text in seen if "needle" not in text)
"""
    returned = sandbox.call(program, "f", [["first"], ["second-test"]], 10, 20)
    assert [one.value for one in returned] == [False, True]  # it would see one: its own argument


def test_without_any_recipe_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(host.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(host.inside, "landlock_version", lambda: 0)
    with pytest.raises(
        SandboxError, match=r"apt-get install bubblewrap libseccomp2.*bwrap.*not installed.*no Landlock"
    ):
        Sandbox()


def test_without_bubblewrap_it_takes_landlock(monkeypatch, sandbox):
    if sandbox.recipe != "landlock":
        pytest.skip("once is enough")
    monkeypatch.setattr(host.shutil, "which", lambda *_, **__: None)
    with Sandbox() as found:
        assert found.recipe == "landlock"


def test_a_recipe_that_does_not_hold_is_not_used(monkeypatch, sandbox):
    """A filter that allows everything: its self-test forks, and says so."""
    allow = struct.pack("HBBI", 6, 0, 0, 0x7FFF0000)  # BPF: return SECCOMP_RET_ALLOW
    monkeypatch.setattr(host, "seccomp_filter", lambda: allow)
    with pytest.raises(SandboxError, match=f"{sandbox.recipe}: its self-test could do what it must not: .*fork.*memfd"):
        Sandbox(recipe=sandbox.recipe)


def test_an_environment_that_leaks_is_seen_by_the_self_test(monkeypatch, sandbox):
    """bubblewrap's own, which --clearenv does not take away, lies in /proc/1/environ."""
    if sandbox.recipe != "bubblewrap":
        pytest.skip("the other recipe shows no /proc")
    empty, leaking = '[*config["command"], str(seconds)], {})', '[*config["command"], str(seconds)], {"TOKEN": "x"})'
    assert empty in host._source()
    source = host._source().replace(empty, leaking)
    monkeypatch.setattr(host, "_source", lambda: source)
    with pytest.raises(SandboxError, match="the environment of the process above it"):
        Sandbox(MEMORY_MB, "bubblewrap")


def test_a_sandbox_whose_starter_ended_says_so():
    with Sandbox() as broken:
        psutil.Process(broken._starter.pid).kill()
        with pytest.raises(SandboxError, match=r"has ended|does not answer"):
            broken.run("print(1)", b"", 5)


def boxed(sandbox: Sandbox) -> list[psutil.Process]:
    return psutil.Process(sandbox._starter.pid).children(recursive=True)


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_confines_itself():
    """What the processes that verify do after their imports, with sympy in them."""
    program = f"""
import json, sys, sympy
from prism_mcore.rewards.sandbox import confine_self
from prism_mcore.rewards.sandbox.probe import PROBE
if not confine_self(): sys.exit(3)
found = {{"__name__": "probe"}}
exec(PROBE, found)
print(json.dumps(found["probe"]()), sympy.simplify("sin(x)**2 + cos(x)**2"))
try: open({os.devnull!r} + "x", "w")
except OSError: print("no file")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    if done.returncode == 3:
        pytest.skip("no Landlock here")
    allowed, one = done.stdout.splitlines()[0].rsplit(" ", 1)
    assert [what for what, could in json.loads(allowed).items() if could] == ["environment variables"]
    assert one == "1" and done.stdout.endswith("no file\n")
