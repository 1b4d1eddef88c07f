"""rl.preset: algorithms by name; a switch that contradicts one is refused, and every switch is read by something."""

import re
from pathlib import Path

import pytest
from tiny.prompt_files import write_prompts
from tiny.runs import settings_of

from prism_mcore.config import SettingsError, load
from prism_mcore.model.settings import resolve_spec
from prism_mcore.rl.checks import check
from prism_mcore.rl.presets import PRESETS
from prism_mcore.rl.settings import PolicySettings, RLSettings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_its_switches_and_may_be_repeated(name):
    settings = PolicySettings(preset=name, prompts_per_step=3)
    assert {key: getattr(settings, key) for key in PRESETS[name]} == PRESETS[name]
    assert PolicySettings(**settings.model_dump()) == settings


def test_the_papers_preset_is_what_the_defaults_and_its_recipe_say():
    defaults = PolicySettings()
    assert {key: getattr(defaults, key) for key in PRESETS["paper"]} == PRESETS["paper"]
    recipe = load(RLSettings, ROOT / "launch/recipes/parts/rl.yaml", ["run.name=x", "rl.preset=paper"])
    assert recipe.rl.preset == "paper"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_the_papers_place_in_its_recipes(name):
    for recipe in ("rl-granite-3.3-8b.yaml", "rl-8-gpus.yaml"):
        settings = load(RLSettings, ROOT / "launch/recipes" / recipe, [f"rl.preset={name}"])
        assert {key: getattr(settings.rl, key) for key in PRESETS[name]} == PRESETS[name]


def test_what_contradicts_a_preset_is_refused_by_name():
    overrides = ["run.name=x", "rl.preset=dapo", "rl.clip_high=0.2", "rl.kl_coefficient=0"]
    with pytest.raises(SettingsError) as error:
        load(RLSettings, None, overrides)
    assert str(error.value).splitlines()[-1].startswith("rl: preset=dapo contradicts clip_high=0.2")
    assert "preset=dapo contradicts clip_high=0.2 (the preset's is 0.28); give what the preset has" in str(error.value)
    with pytest.raises(SettingsError, match=r"preset=dpo; needed: one of paper, grpo, dapo"):
        load(RLSettings, None, ["run.name=x", "rl.preset=dpo"])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes_the_check(name, tmp_path):
    files = write_prompts(tmp_path)
    sections = {
        "rl": {
            "preset": name,
            "prompts": [{"path": str(files / "prompts.jsonl")}],
            "tokenizer": str(files),
            "context": 24,
        },
        "sampling": {"samples": 4, "max_tokens": 10},
    }
    wanted = settings_of(RLSettings, tmp_path, "hybrid", {}, sections)
    if name == "dapo":
        with pytest.raises(SettingsError, match=r"rl.overlong_buffer=4096 is longer than sampling.max_tokens=10"):
            check(wanted, resolve_spec(wanted.model), 1)
    else:
        check(wanted, resolve_spec(wanted.model), 1)


@pytest.mark.parametrize(
    ("rl", "message"),
    [
        ({"dual_clip": 0.5}, "rl.dual_clip=0.5: needed: more than 1"),
        ({"dual_clip": 3.0, "clip": "cispo"}, "rl.dual_clip=3.0 bounds rl.clip=ppo; rl.clip=cispo has no minimum"),
        (
            {"token_budget": 4, "dynamic_sampling": 2},
            "rl.token_budget=4 and rl.dynamic_sampling=2: drawing until enough",
        ),
    ],
)
def test_switches_that_exclude_each_other_are_refused(rl, message, tmp_path):
    files = write_prompts(tmp_path)
    sections = {
        "rl": {"prompts": [{"path": str(files / "prompts.jsonl")}], "tokenizer": str(files), "context": 24, **rl},
        "sampling": {"samples": 4, "max_tokens": 10},
    }
    wanted = settings_of(RLSettings, tmp_path, "hybrid", {}, sections)
    with pytest.raises(SettingsError) as error:
        check(wanted, resolve_spec(wanted.model), 1)
    assert message in str(error.value)


def test_every_switch_is_read_and_stands_in_the_table():
    sources = "\n".join(
        path.read_text()
        for path in (ROOT / "prism_mcore").rglob("*.py")
        if path.name not in ("settings.py", "presets.py")
    )
    table = (ROOT / "launch/README.md").read_text()
    others = {"prompts", "held_out", "tokenizer", "context", "prompts_per_step", "parity", "parity_tolerance", "preset"}
    others |= {"on_change", "held_out_prompts", "held_out_samples", "show"}
    for name in set(PolicySettings.model_fields) - {"preset", "on_change"}:  # read where sections are read, by any name
        assert re.search(rf"\b(rl|settings|settings\.rl|self\.settings)\.{name}\b", sources), name
        assert name in others or f"`{name}`" in table, name
