"""The script that runs on a GPU names the tests that there are."""

import argparse
import importlib
import re
from pathlib import Path

from prism_mcore.config import load
from prism_mcore.model.settings import resolve_spec
from prism_mcore.train.checks import check
from prism_mcore.train.settings import MidtrainSettings

ROOT = Path(__file__).parents[2]


def test_every_test_of_a_triton_kernel_runs_on_a_gpu():
    patterns = re.findall(r"tests/kernels/\S+", (ROOT / "benchmarks" / "gpu_suite.sh").read_text())
    named = {path for pattern in patterns for path in ROOT.glob(pattern)}
    assert all(list(ROOT.glob(pattern)) for pattern in patterns)
    kernels = re.compile(r"^from prism_kernels\.\w+(\.triton import| import .*\btriton\b)", re.M)
    assert named == {path for path in ROOT.glob("tests/kernels/*/test_*.py") if kernels.search(path.read_text())}


def test_every_feature_is_one_that_there_is(monkeypatch):
    """Settings of both sides are accepted for their recipe, on the GPUs that they need."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    features = importlib.import_module("features")
    for feature in features.FEATURES:
        for shape, recipe in features.RECIPES.items():
            arguments = argparse.Namespace(nproc=feature.gpus, steps=1, settings=[], recipes={shape: recipe})
            for side in (feature.on, feature.off):
                command = features.command(shape, side, arguments, Path("out"))
                overrides = command[command.index("out") + 1 :]
                settings = load(MidtrainSettings, ROOT / recipe, overrides)
                check(settings, resolve_spec(settings.model), feature.gpus)


def test_a_feature_is_measured_on_and_off(monkeypatch):
    """On the demo's tiny shape, on this machine: throughput.py runs, and the ratio is that of its fastest steps."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    features = importlib.import_module("features")
    recipes = {"dense": "launch/recipes/demo.yaml"}
    settings = ["model.spec=demo-dense", "data.seq_len=64", "kernels.fp8_linear=reference"]
    arguments = argparse.Namespace(nproc=1, steps=2, rounds=1, settings=settings, recipes=recipes)
    result = features.compared(features.FEATURES[0], "dense", arguments)
    on, off = result["on"][0]["step_s"]["min"], result["off"][0]["step_s"]["min"]
    assert result["speed_up"] == off / on
