"""Exclusive use: the second is told who is there, and a holder that is killed blocks nobody."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from prism_mcore.checkpoint.lock import InUse, exclusive

HOLDER = """
import sys, time
from pathlib import Path
from prism_mcore.checkpoint.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "lock"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_told_who_holds_it_and_since_when(tmp_path, holder):
    with pytest.raises(InUse) as error, exclusive(tmp_path / "lock", patience_s=0.2):
        pass
    since = json.loads((tmp_path / "lock").read_text())["since"]
    expected = f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()} since {since}"
    assert str(error.value) == expected


def test_a_lock_dies_with_its_holder_and_a_file_left_behind_blocks_nobody(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "lock").read_text()
    with exclusive(tmp_path / "lock"):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    with exclusive(tmp_path / "lock"):
        pass


def test_a_holder_that_is_just_ending_is_waited_for(tmp_path, holder):
    os.kill(holder.pid, signal.SIGSTOP)  # still there, and to be killed while the next one waits
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"])
    with exclusive(tmp_path / "lock", patience_s=30):
        pass
    killer.wait()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def unsupported(descriptor, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("prism_mcore.checkpoint.lock.fcntl.flock", unsupported)
    with exclusive(tmp_path / "lock"):
        assert "cannot be locked (Operation not supported)" in caplog.text
