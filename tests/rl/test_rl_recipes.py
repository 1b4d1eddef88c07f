"""Every RL recipe that is shipped loads, fits its model and an H100, and is the paper's run."""

from pathlib import Path

import pytest

from prism_mcore.config import load
from prism_mcore.model.settings import resolve_spec
from prism_mcore.plan.memory import cache_bytes, num_parameters
from prism_mcore.rl.checks import check
from prism_mcore.rl.plan import memory_of
from prism_mcore.rl.settings import RLSettings

FOLDER = Path(__file__).parents[2] / "launch" / "recipes"
STARTER = FOLDER / "rl-8-gpus.yaml"  # for a model of the user's
RECIPES = sorted(set(FOLDER.glob("rl-*.yaml")) - {STARTER})


def test_the_seven_models_have_one_each():
    assert len({load(RLSettings, recipe).model.spec for recipe in RECIPES}) == 7


@pytest.mark.parametrize("recipe", [*RECIPES, STARTER], ids=lambda path: path.stem)
def test_a_recipe_fits_eight_gpus_with_room_for_caches(recipe):
    settings, gpus = load(RLSettings, recipe, ["model.spec=llama-3.1-8b"] if recipe == STARTER else []), 8
    spec = resolve_spec(settings.model)
    check(settings, spec, gpus)
    (stage,) = memory_of(settings, spec, gpus)
    tp = settings.parallel.tp
    reference = 4 * num_parameters(spec) / gpus  # an fp32 shard on each
    fixed, per_token = cache_bytes(spec, tp, 2)
    sequences = 8 * (fixed + settings.rl.context * per_token)  # of the longest, at once
    assert stage.total + reference + sequences < 80e9 - 8e9  # 8 GB for what is not planned


def test_every_model_has_the_papers_four_mixtures():
    mixtures = {}
    for recipe in [*RECIPES, *FOLDER.glob("paper-rl/*.yaml")]:
        settings = load(RLSettings, recipe)
        shares = tuple((source.name, source.weight) for source in settings.rl.prompts)
        mixtures.setdefault(settings.model.spec, set()).add(shares)
    unbalanced, balanced = {"math": 19, "code": 7, "science": 17}, dict.fromkeys(("math", "code", "science"), 1)
    wanted = {
        tuple((name, float(mix[name])) for name in names)
        for mix in (unbalanced, balanced)
        for names in (("math", "code"), ("math", "code", "science"))
    }
    assert len(mixtures) == 7 and all(found == wanted for found in mixtures.values())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_the_papers(recipe):
    settings = load(RLSettings, recipe)
    rl, optimizer = settings.rl, settings.optimizer
    assert (rl.prompts_per_step, settings.sampling.samples, settings.train.steps) == (64, 16, 1000)
    assert (rl.context, settings.sampling.temperature, settings.sampling.top_p) == (16384, 1.0, 1.0)
    assert (optimizer.lr, optimizer.schedule, optimizer.min_lr_ratio) == (5e-7, "linear", 0.0)
    assert (rl.kl_coefficient, rl.tis_cap, rl.advantage, rl.aggregation) == (0.05, 2.0, "grpo", "group_total")
    assert (rl.updates, rl.reference_every > 0, settings.rewards.require_think) == (1, True, True)
