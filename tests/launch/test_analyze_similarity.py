"""launch/analyze.py similarity with a real torchrun: the CKA of transformers' hidden states, and what it refuses."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny.hf_models import save_hf

from prism_mcore.analyze.cka import cka, gram

ROOT = Path(__file__).parents[2]
ONE_PROCESS = [sys.executable]
FOUR_RANKS = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]


def analyze(start, *arguments):
    command = [*start, "launch/analyze.py", "similarity", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def states(model, prompts):
    with torch.no_grad():
        runs = [model(input_ids=torch.tensor([p]), use_cache=False, output_hidden_states=True) for p in prompts]
    return torch.stack([torch.stack([state[0].mean(0) for state in run.hidden_states]) for run in runs])


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Two models of three and two layers, another seed of the first, and two files of prompts."""
    folder = tmp_path_factory.mktemp("similarity")
    found = {
        "hybrid": save_hf("granite-4.0-h-micro", folder / "hybrid"),
        "other-seed": save_hf("granite-4.0-h-micro", folder / "other-seed", seed=1),
        "dense": save_hf("llama-3.1", folder / "dense"),
    }
    random, prompts = torch.Generator().manual_seed(0), {}
    for name, count in (("a", 9), ("b", 6)):
        lengths = torch.randint(1, 30, (count,), generator=random).tolist()
        prompts[name] = [torch.randint(61, (n,), generator=random).tolist() for n in lengths]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"tokens": p}) + "\n" for p in prompts[name]))
    return folder, found, prompts


def test_tables_have_the_cka_of_transformers_hidden_states_under_tp_and_dp(case, tmp_path):
    folder, models, prompts = case
    given = [folder / "hybrid", folder / "dense", "--floor", folder / "hybrid", folder / "other-seed"]
    files = ["--prompts", folder / "a.jsonl", "--prompts", folder / "b.jsonl", "--out", tmp_path / "out"]
    done = analyze(FOUR_RANKS, *given, *files, "parallel.tp=2", "precision.dtype=fp32", "similarity.draws=20")
    assert done.returncode == 0, done.stderr
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".csv", ".parquet", ".json", ".yaml", ".png"}
    rows = list(csv.DictReader((tmp_path / "out" / "similarity.csv").open()))
    for first, second, partners in (("hybrid", "dense", [0, 1, 1, 2]), ("hybrid", "other-seed", [0, 1, 2, 3])):
        for file, tokens in prompts.items():
            other = gram(states(models[second], tokens))[torch.tensor(partners)]
            want = cka(gram(states(models[first], tokens)), other).tolist()
            own = [r for r in rows if (r["prompts"], Path(r["second"]).name) == (f"{file}.jsonl", second)]
            assert [float(row["cka"]) for row in own] == pytest.approx(want, rel=1e-5)
            assert [int(row["second_layer"]) for row in own] == partners
            assert {row["noise_floor"] for row in own} == {str(second == "other-seed")}
    assert len(rows) == 16 and "(two seeds)" in done.stdout and "without a noise floor" not in done.stdout


def test_what_cannot_be_compared_is_named_once(case, tmp_path):
    folder, _, _ = case
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "short.jsonl").write_text('{"tokens": [1]}\n')
    hybrid, dense, prompts = folder / "hybrid", folder / "dense", folder / "a.jsonl"
    for arguments, message in (
        ([hybrid, dense, "--prompts", tmp_path / "empty.jsonl"], "empty.jsonl has no prompts; needed"),
        ([hybrid, dense, "--prompts", tmp_path / "short.jsonl"], "short.jsonl has 1 prompts; needed"),
        ([hybrid, "--prompts", prompts], "needed: at least two models, each once"),
        ([hybrid, tmp_path, "--prompts", prompts], "has no config.json; give Hugging Face directories"),
        ([hybrid, dense, "--prompts", prompts, "parallel.pp=2"], "parallel.pp"),
        ([hybrid, dense, "--prompts", prompts, "similarity.drawz=2"], "similarity.drawz"),
    ):
        done = analyze(ONE_PROCESS, *arguments, "--out", tmp_path / "out")
        assert message in done.stderr and done.stderr.count("error: ") == 1 and done.returncode == 2, done.stderr
    assert not (tmp_path / "out").exists()
