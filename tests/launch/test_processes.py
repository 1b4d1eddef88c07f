"""No process outlives the torchrun that was killed, and a rank that hangs ends the run, one that is slow does not."""

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tiny.hf_models import save_hf
from tiny.recipes import write_midtrain_recipe, write_rl_recipe

from prism_mcore.exit_codes import FAILED

ROOT = Path(__file__).parents[2]


class Launch:
    """`torchrun launch/PROGRAM ...`; every process that comes of it, by the mark in their environment."""

    def __init__(self, ranks: int, program: str, *arguments: object):
        self.mark, self.program = uuid.uuid4().hex, f"launch/{program}.py"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), self.program]
        self.agent = subprocess.Popen(
            [*command, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"PRISM_TEST_MARK": self.mark, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def processes(self) -> list[psutil.Process]:
        """All that live, but torchrun."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != self.agent.pid and process.environ().get("PRISM_TEST_MARK") == self.mark:
                    found += [process] if process.status() != psutil.STATUS_ZOMBIE else []
            except psutil.Error:
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        """By rank, those that have begun to run the launcher."""
        by_rank = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if self.program in process.cmdline() and "RANK" in process.environ():  # not yet in a fork of torchrun
                    by_rank[int(process.environ()["RANK"])] = process
        return [by_rank[rank] for rank in sorted(by_rank)]

    def end(self) -> None:
        for process in (self.agent, *self.processes()):
            process.kill()
        self.agent.communicate()


@pytest.fixture
def launch() -> Iterator[Callable[..., Launch]]:
    started: list[Launch] = []

    def start(*arguments: object) -> Launch:
        started.append(Launch(*arguments))
        return started[-1]

    yield start
    for each in started:
        each.end()


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.002)


def nothing_outlives(run: Launch) -> bool:
    run.agent.kill()
    run.agent.wait()
    until(lambda: not run.processes(), 10)
    return True


def has_mapped(process: psutil.Process, library: str) -> bool:
    return library in Path(f"/proc/{process.pid}/maps").read_text()


def test_nothing_outlives_torchrun_while_ranks_import(launch, tmp_path):
    run = launch(2, "midtrain", "--recipe", write_midtrain_recipe(tmp_path))
    until(lambda: len(run.ranks()) == 2)
    until(lambda: all(has_mapped(rank, "_pydantic_core") for rank in run.ranks()))
    assert nothing_outlives(run)


def test_nothing_outlives_torchrun_in_the_rendezvous(launch, tmp_path):
    run = launch(2, "midtrain", "--recipe", write_midtrain_recipe(tmp_path))
    until(lambda: len(run.ranks()) == 2 and has_mapped(run.ranks()[1], "libtorch_cpu"))
    waiting, late = run.ranks()
    late.suspend()  # never comes
    until(lambda: any(c.status == psutil.CONN_ESTABLISHED for c in waiting.net_connections("tcp")))
    time.sleep(0.2)
    assert waiting.is_running() and run.agent.poll() is None
    assert nothing_outlives(run)


@pytest.mark.parametrize("moment", ["training", "saving"])
def test_nothing_outlives_torchrun_while_a_run_is(launch, tmp_path, moment):
    every = 1 if moment == "saving" else 0
    recipe = write_midtrain_recipe(tmp_path, parallel={"tp": 1}, checkpoint={"every": every})
    run, folder = launch(1, "midtrain", "--recipe", recipe), tmp_path / "run"
    if moment == "training":
        until(lambda: (folder / "metrics.jsonl").is_file())
    else:
        until(lambda: any((folder / "checkpoints").glob(".tmp_step_*")))
    assert nothing_outlives(run)


def test_nothing_outlives_torchrun_while_rollouts_are_generated(launch, tmp_path):
    run = launch(1, "rl", "--recipe", write_rl_recipe(tmp_path, train={"steps": 2000}, rewards={"workers": 2}))
    until(lambda: (tmp_path / "run" / "rollouts" / "step_00000001.jsonl").is_file())
    assert len(run.processes()) == 3  # a rank and its verifiers
    assert nothing_outlives(run)


@pytest.fixture(scope="module")
def generation(tmp_path_factory):
    """What generate.py is to do; rank 1 of two takes a second or so."""
    folder = tmp_path_factory.mktemp("generation")
    save_hf("llama-3.1", folder / "hf")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"tokens": [1, i % 60]}) + "\n" for i in range(120)))
    return ["--hf", folder / "hf", "--prompts", folder / "prompts.jsonl", "sampling.ignore_eos=true"]


def test_a_rank_that_hangs_in_generation_ends_the_run(launch, generation, tmp_path):
    out = tmp_path / "out"
    run = launch(2, "generate", *generation, "generate.slots=2", "--out", out, "parallel.timeout_s=2")
    until(lambda: samples(out, 0) and samples(out, 1))
    hung, begun = run.ranks()[1], time.monotonic()
    hung.suspend()
    until(lambda: len(run.ranks()) == 1)
    assert 2 <= time.monotonic() - begun < 30
    hung.kill()  # torchrun's SIGTERM does not reach it, its SIGKILL comes after 30 s
    errors = run.agent.communicate(timeout=60)[1]
    assert "error: rank 1 said nothing for 2 s while rank 0 waited" in errors
    assert f"exitcode  : {FAILED} " in errors and not out.exists()


def test_a_rank_that_is_slow_in_generation_is_waited_for(launch, generation, tmp_path):
    out = tmp_path / "out"
    run = launch(2, "generate", *generation, "generate.slots=2", "--out", out, "parallel.timeout_s=2")
    until(lambda: samples(out, 0) and samples(out, 1))
    slow, begun = run.ranks()[1], time.monotonic()
    while time.monotonic() - begun < 6:  # three time-outs
        slow.suspend()
        time.sleep(0.8)
        slow.resume()
        time.sleep(0.1)
    assert len(run.ranks()) == 2, "generation was over before"
    errors = run.agent.communicate(timeout=60)[1]
    assert run.agent.returncode == 0, errors
    assert len(out.read_text().splitlines()) == 120


def samples(out: Path, rank: int) -> int:
    """Lines that a rank has written so far."""
    file = Path(f"{out}.samples.{rank}" if rank else f"{out}.samples")
    return file.read_text().count("\n") - 1 if file.is_file() else 0
