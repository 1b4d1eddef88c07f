"""launch/analyze.py as it is called: what it writes, what it says, what it refuses."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny.hf_models import save_hf

ROOT = Path(__file__).parents[2]


def analyze(*arguments):
    command = [sys.executable, "launch/analyze.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, and two that were changed a little."""
    folder = tmp_path_factory.mktemp("models")
    save_hf("granite-4.0-h-micro", folder / "base")
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        (folder / name).mkdir()
        for path in (folder / "base").iterdir():
            if path.suffix == ".safetensors":
                moved = {n: x + 0.01 * torch.randn(x.shape, generator=generator) for n, x in load_file(path).items()}
                save_file(moved, folder / name / path.name, {"format": "pt"})
            else:
                (folder / name / path.name).write_bytes(path.read_bytes())
    return folder


def test_tables_pictures_and_a_table_with_its_control(models, tmp_path):
    out = tmp_path / "out"
    done = analyze("weights", models / "base", models / "one", "--control", models / "two", "--out", out)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {
        "weights.csv",
        "weights.parquet",
        "modules.csv",
        "cosines.csv",
        "weights.json",
        "modules.png",
        "thresholds.png",
        "layers.png",
    }
    header, *rows = csv.reader((out / "weights.csv").open())
    changed = [f"changed_{percent}pct" for percent in ("0.1", "0.5", "1", "2", "5", "10")]
    named = ["name", "module_class", "layer", "numel", "relative_l2"]
    assert header == [*named, *changed, "changed_rms_1pct", "identical_bf16"]
    assert len(rows) == len(load_file(models / "base" / "model.safetensors"))
    assert all(0 <= float(share) <= 1 for row in rows for share in row[5:])
    table = pyarrow.parquet.read_table(out / "weights.parquet").to_pylist()
    assert {row["model"] for row in table} == {"one", "control"} and len(table) == 2 * len(rows)
    (cosine,) = csv.DictReader((out / "cosines.csv").open())
    assert (cosine["first"], cosine["second"]) == ("one", "control") and abs(float(cosine["pooled"])) < 0.2
    assert json.loads((out / "weights.json").read_text())["summed_lr"] == {"one": None, "control": None}
    assert "control" in done.stdout and "without a control" not in done.stdout
    assert "without a control" in analyze("weights", models / "base", models / "one", "--out", tmp_path / "x").stdout


def test_what_cannot_be_compared_is_refused_before_anything_is_written(models, tmp_path):
    save_hf("llama-3.1", tmp_path / "llama")
    for arguments, message in (
        ((models / "base", tmp_path / "llama"), "are different models: "),
        ((models / "base", tmp_path / "nothing"), "holds no checkpoint; give a checkpoint's folder"),
    ):
        done = analyze("weights", *arguments, "--out", tmp_path / "out")
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    (tmp_path / "file").write_text("")
    done = analyze("weights", models / "base", models / "one", "--out", tmp_path / "file")
    assert done.returncode == 2 and "is a file; needed: a folder" in done.stderr
    assert not (tmp_path / "out").exists()
