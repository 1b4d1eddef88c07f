"""launch/midtrain.py as a user runs it: --help, --dry-run, mistakes, and a real torchrun that is told to stop."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny.models import HYBRID

from prism_mcore.data.packing import Concat
from prism_mcore.data.token_file import TokenFile, TokenFileWriter
from prism_mcore.exit_codes import BAD_SETTINGS, DONE, STOPPED_BY_SIGNAL

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]


@pytest.fixture
def recipe(tmp_path):
    tokens = np.arange(4000) % 61
    with TokenFileWriter(tmp_path / "corpus", np.uint16) as writer:
        writer.add(tokens, np.full(100, 40))
    (tmp_path / "model.json").write_text(json.dumps(HYBRID))
    settings = {
        "run": {"name": "run", "dir": str(tmp_path)},
        "model": {"spec": str(tmp_path / "model.json")},
        "parallel": {"tp": 2},
        "data": {"sources": [{"path": str(tmp_path / "corpus")}], "seq_len": 16, "document_mask": True},
        "train": {"steps": 2000, "global_batch": 2},
        "precision": {"dtype": "fp32"},
        "log": {"tensorboard": False},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def launch(*arguments, **environment):
    command = [sys.executable, "launch/midtrain.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def test_help_documents_the_settings():
    result = launch("--help")
    assert result.returncode == DONE
    assert "optimizer.warmup_steps" in result.stdout and "data.document_mask" in result.stdout


def test_a_dry_run_plans_without_ranks(recipe):
    result = launch("--recipe", recipe, "--dry-run", "--gpus", 4, "train.steps=50")
    assert result.returncode == DONE, result.stderr
    assert "FLOP" in result.stdout and not (recipe.parent / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.warmup_step=1", "nearest: optimizer.warmup_steps"),
        ("parallel.tp=3", "parallel.tp=3 does not divide"),
        ("data.sources.0.weight=-1", "data.sources.0.weight"),
        ("model.init=/nowhere", "model.init"),
        ("kernels.nothing=triton", "kernels.nothing: no such op"),
    ],
)
def test_a_mistake_is_one_message_and_an_exit_code(recipe, override, message):
    result = launch("--recipe", recipe, "parallel.tp=1", override)
    assert result.returncode == BAD_SETTINGS
    assert message in result.stderr and "Traceback" not in result.stderr


def test_a_directory_without_weights_is_one_message(recipe, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(HYBRID))
    result = launch("--recipe", recipe, "parallel.tp=1", f"model.init={tmp_path / 'hf'}")
    assert result.returncode == BAD_SETTINGS
    assert "has neither model.safetensors nor" in result.stderr and "Traceback" not in result.stderr


def test_a_token_that_only_one_rank_reads_is_told_by_that_rank(recipe, tmp_path):
    row = int(Concat(TokenFile(tmp_path / "corpus"), 0, 100, 16).shuffle(np.array([1]), 0, 0)[0])  # rank 1, first step
    with open(tmp_path / "corpus.bin", "r+b") as file:
        file.seek(2 * (16 * row + 3))
        file.write(np.uint16(200).tobytes())
    command = [*TORCHRUN, "launch/midtrain.py", "--recipe", str(recipe), "parallel.tp=1", "data.prefetch_steps=0"]
    environment = os.environ | {"EXIT_CODE_FILE": str(tmp_path / "exit_code"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert "error: rank 1: " in done.stderr and "token id 200 in document" in done.stderr
    assert (tmp_path / "exit_code").read_text() == f"{BAD_SETTINGS}\n"


def test_sigterm_to_torchrun_saves_and_the_same_command_goes_on(recipe, tmp_path):
    command = [*TORCHRUN, "launch/midtrain.py", "--recipe", str(recipe)]
    environment = os.environ | {"EXIT_CODE_FILE": str(tmp_path / "exit_code"), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert (tmp_path / "exit_code").read_text() == f"{STOPPED_BY_SIGNAL}\n", errors.decode()[-2000:]
    stopped = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{stopped:08d}"
    again = subprocess.run([*command, f"train.steps={stopped + 2}"], cwd=ROOT, env=environment, capture_output=True)
    assert again.returncode == DONE, again.stderr.decode()[-2000:]
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, stopped + 3))
