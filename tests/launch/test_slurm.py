"""launch/slurm/train.sbatch on a Slurm of two nodes that is there; without one, this is skipped."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tiny.recipes import write_midtrain_recipe

ROOT = Path(__file__).parents[2]


def idle_nodes() -> int:
    if shutil.which("sinfo") is None or shutil.which("sbatch") is None:
        return 0
    done = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], capture_output=True, text=True)
    return done.stdout.split().count("idle")


pytestmark = pytest.mark.skipif(idle_nodes() < 2, reason="needs a running Slurm with two idle nodes (sinfo, sbatch)")


class Job:
    """The real script, on two nodes without GPUs."""

    def __init__(self, folder: Path, *arguments: object, minutes: int = 10):
        self.log = folder / "log"
        # Options win over the script's own lines; that for GPUs goes, because there are none to ask for.
        script = (ROOT / "launch" / "slurm" / "train.sbatch").read_text()
        (folder / "train.sbatch").write_text(re.sub("#SBATCH --gpus-per-node.*\n", "", script))
        options = ["--nodes=2", f"--time={minutes}", "--signal=USR1@60", f"--output={self.log}", f"--chdir={ROOT}"]
        command = ["sbatch", "--parsable", *options, str(folder / "train.sbatch"), *map(str, arguments)]
        environment = {name: value for name, value in os.environ.items() if name != "USER"} | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.number = done.stdout.strip()

    def state(self, name: str = "JobState") -> str:
        shown = subprocess.run(["scontrol", "show", "job", self.number], capture_output=True, text=True).stdout
        return shown.partition(f"{name}=")[2].split()[0]

    def says(self, text: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while text not in (said := self.log.read_text() if self.log.is_file() else ""):
            assert time.monotonic() < deadline, f"no {text!r} in:\n{said[-4000:]}"
            time.sleep(0.2)

    def ends(self, state: str) -> str:
        """The log, once the job is in that state."""
        deadline = time.monotonic() + 120
        while self.state() != state:
            assert time.monotonic() < deadline, f"{self.state()}, not {state}:\n{self.log.read_text()[-4000:]}"
            time.sleep(0.5)
        return self.log.read_text()

    def cancel(self) -> None:
        subprocess.run(["scancel", self.number], check=False)
        self.ends("CANCELLED" if self.state() in ("RUNNING", "PENDING", "CANCELLED", "COMPLETING") else self.state())
        time.sleep(1)  # ranks may still write their code
        for left in ROOT.glob(f"prism-{self.number}.exit_code*"):
            left.unlink()


@pytest.fixture
def submit(tmp_path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def start(*arguments: object, **options: int) -> Job:
        jobs.append(Job(tmp_path, *arguments, **options))
        return jobs[-1]

    yield start
    for job in jobs:
        job.cancel()


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_settings_that_are_refused_end_the_job_without_another_try(submit, tmp_path):
    job = submit("midtrain", "--recipe", write_midtrain_recipe(tmp_path), "parallel.tp=3")
    log = job.ends("FAILED")
    assert job.state("ExitCode") == "2:0" and "parallel.tp=3" in log and "attempt" not in log


def test_a_program_that_is_none_is_refused(submit):
    job = submit("train", "--recipe", "x")
    assert "train is no program" in job.ends("FAILED") and job.state("ExitCode") == "2:0"


def test_a_killed_rank_is_survived_by_a_second_attempt(submit, tmp_path):
    recipe = write_midtrain_recipe(tmp_path, checkpoint={"every": 5}, train={"steps": 200, "global_batch": 2})
    job = submit("midtrain", "--recipe", recipe)
    job.says("saved")
    found = [p for p in psutil.process_iter(["cmdline", "environ"]) if str(recipe) in (p.info["cmdline"] or [])]
    (rank,) = [p for p in found if (p.info["environ"] or {}).get("RANK") == "1"]
    rank.kill()
    log = job.ends("COMPLETED")
    assert "crashed" in log and "attempt 2 of 5" in log and "done" in log
    assert steps(tmp_path) == list(range(1, 201))


def test_a_job_whose_time_is_over_saves_and_is_queued_again(submit, tmp_path):
    job = submit("midtrain", "--recipe", write_midtrain_recipe(tmp_path, train={"steps": 10**6}), minutes=3)
    job.says("stopped by a signal and saved", 240)
    job.ends("PENDING")
    assert job.state("Restarts") == "1"
    stopped = steps(tmp_path)[-1]
    subprocess.run(["scontrol", "update", f"JobId={job.number}", "StartTime=now"], check=True)
    job.says("resuming from", 180)
    deadline = time.monotonic() + 60
    while steps(tmp_path)[-1] <= stopped + 1:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    taken = steps(tmp_path)
    assert taken == list(range(1, taken[-1] + 1))
