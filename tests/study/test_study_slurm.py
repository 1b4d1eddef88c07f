"""A study on Slurm: what is queued; and, on a Slurm of two nodes that is there, all of it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from tiny.studies import write_study

from prism_mcore.config import load
from prism_mcore.exit_codes import BAD_SETTINGS, DONE
from prism_mcore.study.graph import Command, build
from prism_mcore.study.settings import StudyProgram
from prism_mcore.study.slurm import job_argv, sbatch_argv

ROOT = Path(__file__).parents[2]


def study(recipe: Path, *words: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) if path is None else os.environ | {"PATH": path}
    argv = [sys.executable, "launch/study.py", "--recipe", str(recipe), *words]
    return subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_node_is_queued_after_what_it_reads():
    recipe = ROOT / "launch/recipes/study-paper.yaml"
    program = load(StudyProgram, recipe, ["study.sbatch=[--account=x]"])
    nodes = build(program, recipe)
    argv = sbatch_argv(program, nodes["mcs-rl-mcs.nemotron-h-8b.s0"], ["--recipe", "R"], ["7", "8"])
    for option in ("--nodes=8", "--gpus-per-node=8", "--requeue", "--dependency=afterok:7:8", "--account=x"):
        assert option in argv
    assert argv[-3:] == ["R", "run", "mcs-rl-mcs.nemotron-h-8b.s0"]
    argv = sbatch_argv(program, nodes["midtraining.nemotron-h-8b.s0"], [], [])
    assert "--nodes=1" in argv and "--gpus-per-node=1" in argv and not any("dependency" in word for word in argv)


def test_launchers_run_on_all_nodes_of_a_job_and_tools_on_one():
    assert job_argv(Command(("launch/rl.py", "--recipe", "x"), 16))[:3] == ["bash", "launch/slurm/train.sbatch", "rl"]
    assert job_argv(Command(("tools/convert_checkpoint.py", "to-hf"), 1))[0] == sys.executable


def test_slurm_without_sbatch_is_one_message(tmp_path):
    done = study(write_study(tmp_path), "--slurm", path=str(tmp_path))
    assert done.returncode == BAD_SETTINGS
    assert "--slurm needs Slurm's sbatch" in done.stderr and "Traceback" not in done.stderr


def idle_nodes() -> int:
    if shutil.which("sinfo") is None or shutil.which("sbatch") is None:
        return 0
    return (
        subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], capture_output=True, text=True).stdout.split().count("idle")
    )


@pytest.mark.skipif(idle_nodes() < 2, reason="needs a running Slurm with two idle nodes (sinfo, sbatch)")
def test_all_of_it_is_queued_once_and_runs_to_its_report(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("USER", raising=False)
    recipe = write_study(tmp_path)
    settings = yaml.safe_load(recipe.read_text())
    settings["study"] |= {"gpus": False, "gpus_per_node": 1}
    recipe.write_text(yaml.safe_dump(settings))
    first = study(recipe, "--slurm")
    assert first.returncode == DONE and "4 jobs queued" in first.stdout, first.stderr
    second = study(recipe, "--slurm")
    assert second.returncode == BAD_SETTINGS and "of this study are in the queue" in second.stderr
    assert study(recipe).returncode == BAD_SETTINGS  # nor here
    report = tmp_path / "studies/tiny/nodes/report/out/report.json"
    deadline, killed = time.monotonic() + 300, False
    while not report.is_file():
        assert time.monotonic() < deadline, study(recipe, "status").stdout
        ranks = [
            p for p in psutil.process_iter(["cmdline", "environ"]) if "launch/midtrain.py" in (p.info["cmdline"] or [])
        ]
        if not killed and (found := [p for p in ranks if "RANK" in (p.info["environ"] or {})]):
            found[0].send_signal(signal.SIGKILL)  # the second attempt goes on
            killed = True
        time.sleep(0.5)
    assert killed
    deadline = time.monotonic() + 60
    while "4 done" not in (shown := study(recipe, "status").stdout):
        assert time.monotonic() < deadline, shown
        time.sleep(1)
    assert "all of it is done" in study(recipe, "--slurm").stdout
