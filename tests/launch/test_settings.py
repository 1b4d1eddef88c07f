"""Every launcher's settings as a user meets them: help, mistakes and plans come at once, and are the program's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny.models import HYBRID
from tiny.prompt_files import write_prompts

from prism_mcore.exit_codes import BAD_SETTINGS, DONE
from prism_mcore.launching import PROGRAMS

ROOT = Path(__file__).parents[2]
OF = {kind.program.removeprefix("launch/"): kind for kind in PROGRAMS}

# Runs main() and says whether torch was imported on the way: the seconds that a wrong key should not take.
QUICKLY = """
import runpy, sys
try:
    code = runpy.run_path(sys.argv[0], run_name="launcher")["main"]()
except SystemExit as end:
    code = end.code
sys.stdout.flush()
print("torch" if "torch" in sys.modules else "no torch", file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model's shape without weights, and what each program wants beside it."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "config.json").write_text(json.dumps(HYBRID))
    write_prompts(folder)  # and the tokenizer, which questions need
    (folder / "tokens.json").write_text("[[1, 2, 3], [4, 5, 6]]")
    (folder / "prompts.jsonl").write_text('{"tokens": [1, 2]}\n')
    model = [f"model.spec={folder / 'config.json'}", "run.name=run", f"run.dir={folder}"]
    hf = ["--hf", folder, "--out", folder / "out"]
    return {
        "midtrain.py": [*model, "data.sources=[{path: corpus}]", "data.seq_len=16"],
        "rl.py": [*model, "rl={prompts: [{path: p.jsonl}], context: 24}", "sampling={max_tokens: 10, samples: 2}"],
        "score.py": [*hf, "--tokens", folder / "tokens.json"],
        "generate.py": [*hf, "--prompts", folder / "prompts.jsonl"],
        "evaluate.py": [*hf, "--tasks", "own-choice", "sampling.max_tokens=4"],
    }


def launch(name, *arguments):
    """(exit code, stdout, stderr) of a launcher that must not import torch, outside torchrun."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    code = f"import sys; sys.argv[0] = 'launch/{name}'\n{QUICKLY}"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.endswith("no torch\n"), done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", OF)
def test_help_shows_the_programs_own_settings(name):
    code, text, _ = launch(name, "--help")
    assert code == DONE
    sections = {field for kind in PROGRAMS for field in kind.model_fields}
    shown = {section for section in sections if f"\n{section}:" in text}
    assert shown == set(OF[name].model_fields)


@pytest.mark.parametrize("name", OF)
def test_a_dry_run_shows_the_programs_own_settings_and_takes_no_recipe(inputs, name):
    code, text, error = launch(name, *inputs[name], "parallel.tp=2", "--dry-run")
    assert code == DONE, error
    assert list(yaml.safe_load(text.partition("Settings\n")[2].partition("\n\n")[0])) == list(OF[name].model_fields)
    assert max(len(line) for line in text.splitlines() if not line.startswith("note: ")) <= 80


@pytest.mark.parametrize("name", OF)
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tpp=2", "there is no setting parallel.tpp; nearest: parallel.tp"),
        ("kernels.rope=tritn", "kernels.rope=tritn: rope has no such backend (did you mean triton?)"),
    ],
)
def test_a_mistake_is_one_message_and_an_exit_code(inputs, name, override, message):
    code, _, error = launch(name, *inputs[name], override, "--dry-run")
    assert code == BAD_SETTINGS and message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("name", "override", "owners"),
    [
        ("midtrain.py", "rl.prompts=[]", "launch/rl.py"),
        ("rl.py", "data.seq_len=8", "launch/midtrain.py"),
        ("rl.py", "train.global_batch=8", "launch/midtrain.py"),
        ("score.py", "sampling.top_k=3", "launch/rl.py and launch/generate.py"),
        ("generate.py", "train.steps=3", "launch/midtrain.py and launch/rl.py"),
    ],
)
def test_a_setting_of_another_program_is_refused_with_its_name(inputs, name, override, owners):
    code, _, error = launch(name, *inputs[name], override, "--dry-run")
    assert code == BAD_SETTINGS
    assert f"{override.partition('=')[0]} is a setting of {owners}, which launch/{name} does not have" in error


def test_a_run_without_recipe_needs_a_name(inputs):
    code, _, error = launch("midtrain.py", *inputs["midtrain.py"], "run.name=''", "--dry-run")
    assert code == BAD_SETTINGS and "run.name is empty; give run.name=NAME" in error


def test_a_mid_training_recipe_may_be_the_base_of_an_rl_recipe(inputs, tmp_path):
    base = f"model: {{spec: {inputs['score.py'][1] / 'config.json'}}}\ntrain: {{steps: 5, global_batch: 2}}\n"
    (tmp_path / "midtrain.yaml").write_text(base + "data: {sources: [{path: corpus}]}\n")
    (tmp_path / "rl.yaml").write_text(
        "base: midtrain.yaml\nrl: {prompts: [{path: p.jsonl}], context: 24}\nsampling: {samples: 2, max_tokens: 10}\n"
    )
    code, text, error = launch("rl.py", "--recipe", tmp_path / "rl.yaml", "--dry-run")
    assert code == DONE, error
    assert "train.global_batch, data left out, settings of launch/midtrain.py" in text and "steps: 5" in text


def test_arguments_that_cannot_be_read_are_recorded_for_the_script_that_restarts(tmp_path, monkeypatch):
    monkeypatch.setenv("EXIT_CODE_FILE", str(tmp_path / "exit_code"))
    code, _, error = launch("midtrain.py", "--gpus", "0")
    assert code == BAD_SETTINGS and "0; needs at least 1" in error
    assert (tmp_path / "exit_code").read_text() == f"{BAD_SETTINGS}\n"


@pytest.mark.parametrize("name", sorted(set(OF) - {"midtrain.py"}))
def test_only_mid_training_shards_sequences(inputs, name):
    code, _, error = launch(name, *inputs[name], "parallel.cp=2", "--dry-run")
    assert code == BAD_SETTINGS and "parallel.cp=2: only mid-training shards sequences" in error
