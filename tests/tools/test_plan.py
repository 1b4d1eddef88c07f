"""tools/plan.py: the fastest layouts as a table and as a recipe, and clear errors."""

import subprocess
import sys
from pathlib import Path

import yaml

from prism_mcore.config import load
from prism_mcore.model.spec import read_spec
from prism_mcore.train.checks import check
from prism_mcore.train.settings import MidtrainSettings

ROOT = Path(__file__).parent.parent.parent


def plan(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "plan.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_fastest_layout_is_a_recipe(tmp_path):
    out = tmp_path / "layout.yaml"
    done = plan("--model", "nemotron-h-8b", "--gpus", 128, "--best", 3, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "tp 2 dp 64" in done.stdout and "tokens/s a GPU" in done.stdout
    recipe = ["model.spec=nemotron-h-8b", "train.global_batch=128", "data.seq_len=8192"]
    recipe += ["data.sources=[{path: a, weight: 1, domain: a}]", "run.name=x"]
    settings = load(MidtrainSettings, out, recipe)
    check(settings, read_spec("nemotron-h-8b"), 128)
    assert settings.precision.fp8 == "tensorwise" and yaml.safe_load(out.read_text())["parallel"]["tp"] == 2


def test_published_runs_are_printed_beside_predictions():
    done = plan("--check")
    assert done.returncode == 0 and "14,451" in done.stdout and "shape from memory" in done.stdout


def test_what_cannot_be_planned_is_said():
    for arguments, message in (
        (("--gpus", 8), "--model missing"),
        (("--model", "lama-3.1-8b", "--gpus", 8), "llama-3.1-8b"),
        (("--model", "llama-3.1-8b", "--gpus", 8, "--gpu", "h10"), "did you mean h100?"),
        (("--model", "llama-3.1-8b", "--gpus", 0), "--gpus is 0"),
        (("--model", "mistral-small-24b-2501", "--gpus", 1), "nothing fits"),
    ):
        done = plan(*arguments)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
