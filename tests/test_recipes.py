"""Every recipe that is shipped loads, fits its model, and fits an H100."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from prism_mcore.config import load
from prism_mcore.exit_codes import BAD_SETTINGS, DONE, STOPPED_BY_GUARD, STOPPED_BY_SIGNAL
from prism_mcore.model.settings import resolve_spec
from prism_mcore.train.checks import check
from prism_mcore.train.plan import memory_of
from prism_mcore.train.settings import MidtrainSettings

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "launch" / "recipes"
PAPER = sorted((RECIPES / "paper").glob("*.yaml"))
# Percent of tokens per domain, PRISM figure 2.
DOMAINS = {
    "m": {"math": 75, "general": 25},
    "mc": {"math": 47.5, "code": 42.5, "general": 10},
    "mcs": {"math": 37, "code": 40.5, "science": 12.5, "general": 10},
}


def test_the_paper_has_21_recipes():
    assert len(PAPER) == 21


@pytest.mark.parametrize("recipe", PAPER, ids=lambda path: path.stem)
@pytest.mark.parametrize("gpus", [128, 8])
def test_a_recipe_of_the_paper_fits_its_gpus(recipe, gpus):
    settings = load(MidtrainSettings, recipe, ["parallel.tp=8"] if gpus == 8 and "small-24b" in recipe.stem else [])
    spec = resolve_spec(settings.model)
    check(settings, spec, gpus)
    assert settings.run.name == recipe.stem
    # leaves 8 GB of 80 for what is not planned
    assert max(stage.total for stage in memory_of(settings, spec, gpus)) < 72e9


@pytest.mark.parametrize("recipe", PAPER, ids=lambda path: path.stem)
def test_a_recipe_of_the_paper_has_its_tokens_and_shares(recipe):
    settings = load(MidtrainSettings, recipe)
    tokens = settings.train.steps * settings.train.global_batch * settings.data.seq_len
    assert tokens == 26_214_400_000
    shares: dict[str, float] = {}
    for source in settings.data.sources:
        shares[source.domain] = shares.get(source.domain, 0) + 100 * source.weight
    assert shares == pytest.approx(DOMAINS[recipe.stem.rsplit("-", 1)[1]])
    chat = [source.weight for source in settings.data.sources if source.path.endswith(CHAT)]
    assert sum(chat) == pytest.approx(0.10 if recipe.stem.endswith("-m") else 0.05)


LONG = sorted((RECIPES / "long-context").glob("*.yaml"))


def test_the_ablation_of_the_context_has_seven_models_of_two_lengths():
    assert len(LONG) == 14 + 2


@pytest.mark.parametrize("recipe", LONG, ids=lambda path: path.stem)
def test_a_recipe_of_long_context_fits_its_gpus(recipe):
    settings = load(MidtrainSettings, recipe)
    spec, restores = resolve_spec(settings.model), recipe.stem.startswith("lc-")
    gpus = 144 if restores else 128
    check(settings, spec, gpus)
    assert settings.run.name == recipe.stem
    tokens = settings.train.steps * settings.train.global_batch * settings.data.seq_len
    assert tokens == (4_718_592_000 if restores else 26_214_400_000)
    assert max(stage.total for stage in memory_of(settings, spec, gpus)) < 72e9


CHAT = ("wildchat-1m-gpt4", "tulu-3-personas", "ultrachat-200k")


@pytest.mark.parametrize(
    ("name", "ranks"), [("demo", 2), ("demo-bare", 2), ("hybrid-random", 1), ("dense-random", 1), ("dense-random", 2)]
)
def test_the_small_recipes_fit(name, ranks):
    settings = load(MidtrainSettings, RECIPES / f"{name}.yaml")
    assert settings.run.name == name
    check(settings, resolve_spec(settings.model), ranks)


@pytest.mark.parametrize("name", ["qwen2.5-7b", "qwen3-8b"])
def test_recipes_of_further_models_fit_their_gpus(name):
    settings = load(MidtrainSettings, RECIPES / f"{name}.yaml")
    spec = resolve_spec(settings.model)
    check(settings, spec, 128)
    assert (settings.run.name, settings.model.spec) == (name, name)
    assert max(stage.total for stage in memory_of(settings, spec, 128)) < 72e9


def test_the_starter_fits_an_8b_model_on_eight_gpus():
    settings = load(MidtrainSettings, RECIPES / "midtrain-8-gpus.yaml", ["model.spec=llama-3.1-8b"])
    spec = resolve_spec(settings.model)
    check(settings, spec, 8)
    assert max(stage.total for stage in memory_of(settings, spec, 8)) < 72e9


def midtrain(*arguments: str, columns: int = 140) -> subprocess.CompletedProcess:
    """Run the launcher as a user would, outside torchrun."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, str(ROOT / "launch" / "midtrain.py"), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment | {"COLUMNS": str(columns)}, capture_output=True, text=True, check=False
    )


def test_a_dry_run_prints_the_plan_of_128_gpus():
    recipe = "launch/recipes/paper/nemotron-h-8b-mcs.yaml"
    done = midtrain("--recipe", recipe, "optimizer.lr=3e-5", "--dry-run", "--gpus", "128")
    assert done.returncode == 0, done.stderr
    for part in ("lr: 3.0e-05", "8,100,852,736", "tp 2 x pp 1 x cp 1 x dp 64", "26,214,400,000", "H100 SXM"):
        assert part in done.stdout


def test_a_dry_run_keeps_its_columns_at_80_and_its_settings_to_itself(tmp_path):
    layout = ["parallel.pp=4", f"run.dir=/{'a-long-way/' * 10}"]
    recipe = "launch/recipes/paper/mistral-small-24b-2501-mcs.yaml"
    done = midtrain("--recipe", recipe, *layout, "--dry-run", "--gpus", "128", columns=80)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    head = ["stage", "layers", "params", "weights", "gradients", "optimizer", "activations", "loss", "total"]
    stages = lines[lines.index(head) + 1 :][:4]
    assert [(stage[0], stage[3], len(stage)) for stage in stages] == [(f"{n}", "B", len(head) + 1) for n in range(4)]
    assert "…" not in done.stdout
    (tmp_path / "again.yaml").write_text(done.stdout.partition("Settings\n")[2].partition("\n\n")[0])
    resolved = load(MidtrainSettings, tmp_path / "again.yaml")  # YAML still: no line was cut; and no other program's
    assert resolved == load(MidtrainSettings, recipe, layout)
    rates = lines[lines.index(["GPU", "tokens/s", "a", "GPU", "GPU", "hours"]) + 1 :][:3]
    assert [line[:2] for line in rates] == [["H100", "SXM"], ["H200", rates[1][1]], ["H100", "500"]]
    assert "A step, bound by products" in done.stdout


def test_settings_that_cannot_work_end_with_code_2_and_no_traceback():
    done = midtrain("--recipe", "launch/recipes/demo.yaml", "--dry-run", "parallel.tp=3")
    assert done.returncode == 2
    assert "key/value heads; try 2" in done.stderr and "Traceback" not in done.stderr


def test_the_slurm_script_knows_the_exit_codes():
    script = (ROOT / "launch" / "slurm" / "train.sbatch").read_text()
    for code, action in (
        (DONE, "exit 0"),
        (BAD_SETTINGS, f"exit {BAD_SETTINGS}"),
        (STOPPED_BY_SIGNAL, "requeue"),
        (STOPPED_BY_GUARD, f"exit {STOPPED_BY_GUARD}"),
    ):
        assert re.search(rf"^\s*{code}\) .*{action}", script, re.MULTILINE)
