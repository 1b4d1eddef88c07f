"""Ranks start, end, and are missed when they die or hang."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from ranks import RankError, run_ranks

START_ALONE = """
import megatron.core, torch
from prism_mcore import platform
from prism_mcore.parallel import ParallelSettings, destroy_groups, init_groups
for _ in range(2):
    assert platform.start() == torch.device("cpu")
assert init_groups(ParallelSettings()).world_size == 1
destroy_groups()
assert init_groups(ParallelSettings()).is_last_stage
platform.shutdown()
platform.shutdown()
print("alone")
"""


def test_one_process_needs_no_launcher():
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    run = subprocess.run([sys.executable, "-c", START_ALONE], env=env, capture_output=True, text=True, timeout=120)
    assert run.stdout == "alone\n", run.stderr


def test_more_ranks_than_gpus_are_told_how_many_there_are(monkeypatch):
    from prism_mcore import platform

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RuntimeError, match="there are 1; start torchrun with --nproc-per-node=1"):
        platform._cuda_device()


def world_size(groups):
    return groups.world_size


def die_on_rank_1(groups):
    if groups.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.all_reduce(torch.ones(1), group=groups.dp)


def test_a_killed_rank_ends_the_others_with_an_error():
    begin = time.monotonic()
    with pytest.raises(RankError) as error:
        run_ranks(2, die_on_rank_1)
    assert "SIGKILL" in error.value.reports[1]
    assert "Connection" in error.value.reports[0]
    assert time.monotonic() - begin < 60  # not the collective's time-out
    assert run_ranks(2, world_size) == [2, 2]  # and the pool serves the next test


def hang(groups):
    if groups.rank == 0:
        time.sleep(600)


def test_a_hung_rank_is_an_error_that_names_it():
    with pytest.raises(RankError, match="did not answer within 1 s") as error:
        run_ranks(2, hang, timeout_s=1)
    assert set(error.value.reports) == {0}


THREADS = """
import torch
from prism_mcore import platform
chosen = platform._threads_are_chosen()
platform._cpu_device(None)
print(chosen, torch.get_num_threads())
"""


def threads(tmp_path, launcher=(), **environment):
    """Were they chosen by a person, and how many are they? Without a launcher or under torchrun."""
    (tmp_path / "threads.py").write_text(THREADS)
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | environment
    command = [sys.executable, *launcher, str(tmp_path / "threads.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines())


def test_the_number_of_threads_that_a_person_sets_wins(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
    cores = len(os.sched_getaffinity(0))
    assert threads(tmp_path) == {f"False {cores}"}
    assert threads(tmp_path, OMP_NUM_THREADS="1") == {"True 1"}
    assert threads(tmp_path, torchrun) == {f"False {max(1, cores // 2)}"}  # torchrun sets 1 by itself
    assert threads(tmp_path, torchrun, OMP_NUM_THREADS="2") == {f"True {min(2, cores)}"}  # MKL takes no more than cores
