"""launch/rl.py as a user runs it: a plan, mistakes with one message each, and a run whose curves are drawn."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny.models import HYBRID
from tiny.prompt_files import write_prompts

from prism_mcore.exit_codes import BAD_SETTINGS, DONE
from prism_mcore.model.spec import spec_from_config
from prism_mcore.rl.prompts import PromptError, open_prompts
from prism_mcore.rl.settings import RLSettings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = write_prompts(tmp_path_factory.mktemp("rl"))
    (folder / "model.json").write_text(json.dumps(HYBRID))
    settings = {
        "run": {"name": "run", "dir": str(folder)},
        "model": {"spec": str(folder / "model.json")},
        "rl": {
            "prompts": [{"path": str(folder / "prompts.jsonl")}],
            "held_out": [{"path": str(folder / "held-out.jsonl")}],
            "tokenizer": str(folder),
            "context": 24,
            "prompts_per_step": 2,
        },
        "rewards": {"require_think": False, "workers": 1},
        "sampling": {"samples": 3, "max_tokens": 10},
        "train": {"steps": 2},
        "precision": {"dtype": "fp32"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(*arguments):
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "140"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_dry_run_reads_the_prompts_where_they_are(recipe):
    done = run("launch/rl.py", "--recipe", recipe, "--dry-run")
    assert done.returncode == DONE, done.stderr
    assert "7 prompts and 4 held out were read and are in order; rewards: choice" in done.stdout
    broken = recipe.parent / "unknown.jsonl"
    broken.write_text('{"prompt": "w1", "answer": "A", "reward": "choices"}\n')
    done = run("launch/rl.py", "--recipe", recipe, "--dry-run", f"rl.prompts=[{{path: {broken}}}]")
    assert done.returncode == BAD_SETTINGS
    assert "unknown.jsonl, line 1" in done.stderr and "choices" in done.stderr and "Traceback" not in done.stderr


def test_a_dry_run_plans_without_prompts():
    done = run("launch/rl.py", "--recipe", "launch/recipes/rl-nemotron-h-8b.yaml", "--dry-run", "--gpus", 8)
    assert done.returncode == DONE, done.stderr
    assert "the prompts are not checked" in done.stdout
    for part in ("64 prompts x 16 = 1,024", "reference policy", "tp 2 x pp 1 x cp 1 x dp 4", "8,100,852,736"):
        assert part in done.stdout


def test_a_mistake_in_a_prompt_file_is_one_message_with_its_place(recipe):
    broken = recipe.parent / "broken.jsonl"
    broken.write_text((recipe.parent / "prompts.jsonl").read_text() + '{"prompt": "w1"\n')
    done = run("launch/rl.py", "--recipe", recipe, f"rl.prompts=[{{path: {broken}}}]")
    assert done.returncode == BAD_SETTINGS
    assert "broken.jsonl, line 8: not JSON" in done.stderr and "Traceback" not in done.stderr


def test_a_mistake_in_the_settings_is_one_message(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("EXIT_CODE_FILE", str(tmp_path / "exit_code"))  # or the run would be started again
    done = run("launch/rl.py", "--recipe", recipe, "parallel.pp=2", "rl.updates=3")
    assert done.returncode == BAD_SETTINGS and (tmp_path / "exit_code").read_text() == f"{BAD_SETTINGS}\n"
    assert "parallel.pp=2" in done.stderr and "rl.updates=3" in done.stderr and "Traceback" not in done.stderr


def test_prompts_and_weights_that_are_not_there_are_one_message_of_each_node(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("EXIT_CODE_FILE", str(tmp_path / "exit_code"))
    monkeypatch.setenv("RANK", "1")  # the first of its node, whose disk lacks the file
    monkeypatch.setenv("LOCAL_RANK", "0")
    environment = os.environ | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "launch/rl.py", "--recipe", str(recipe), "rl.prompts=[{path: /nowhere.jsonl}]"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == BAD_SETTINGS and (tmp_path / "exit_code").read_text() == f"{BAD_SETTINGS}\n"
    assert done.stderr.count("cannot read /nowhere.jsonl") == 1 and "Traceback" not in done.stderr
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(HYBRID))
    done = run("launch/rl.py", "--recipe", recipe, f"model.init={tmp_path / 'hf'}")
    assert done.returncode == BAD_SETTINGS
    assert "has neither model.safetensors nor" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rl": {"tokenizer": "/nowhere"}}, "/nowhere has no tokenizer.json"),
        ({"sampling": {"max_tokens": 20}}, "prompts.jsonl, line 1: the prompt has 5 tokens; at most 4 fit"),
    ],
)
def test_prompts_and_tokenizer_are_checked_against_the_settings(recipe, change, message):
    settings = yaml.safe_load(recipe.read_text())
    settings = RLSettings.model_validate({**settings, **{k: {**settings[k], **v} for k, v in change.items()}})
    with pytest.raises(PromptError, match=message):
        open_prompts(settings, spec_from_config(HYBRID))


def test_every_end_token_that_the_model_names_ends_a_response(recipe, tmp_path):
    """rl.tokenizer's folder knows its own; the model's names two more, and a run that started from it has kept them."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(HYBRID | {"eos_token_id": [7, 8]}))
    shutil.copytree(tmp_path / "hf", tmp_path / "run" / "source")
    written = yaml.safe_load(recipe.read_text())
    for init, config in (("hf", "hf"), ("run", "run/source")):
        model = written["model"] | {"init": str(tmp_path / init)}
        settings = RLSettings.model_validate(written | {"model": model})
        assert open_prompts(settings, spec_from_config(HYBRID)).eos == (0, 7, 8)
        (tmp_path / config / "generation_config.json").write_text('{"eos_token_id": "1"}')
        with pytest.raises(PromptError, match=r"generation_config.json: eos_token_id is '1'; needed: a token id"):
            open_prompts(settings, spec_from_config(HYBRID))


def test_a_run_shows_its_rollouts_and_its_curves(recipe):
    done = run("launch/rl.py", "--recipe", recipe)
    assert done.returncode == DONE, done.stderr
    assert "held out: correct" in done.stderr and "Assistant:" in done.stderr and "step 2/2 | reward" in done.stderr
    folder = recipe.parent / "run"
    assert len((folder / "rollouts" / "step_00000002.jsonl").read_text().splitlines()) == 6
    drawn = run("tools/plot_run.py", folder)
    assert drawn.returncode == 0 and (folder / "curves.png").stat().st_size > 20_000
