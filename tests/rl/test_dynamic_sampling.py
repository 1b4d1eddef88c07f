"""rl.dynamic_sampling draws prompts until enough groups have spread; rl.kl_in=reward scores before it rewards."""

from contextlib import ExitStack

import pytest
import torch
from ranks import run_ranks
from tiny.prompt_files import write_prompts
from tiny.runs import assert_same_state, records, settings_of, state_of

from prism_mcore.exit_codes import DONE
from prism_mcore.model.settings import resolve_spec
from prism_mcore.rl.advantage import has_spread
from prism_mcore.rl.prompts import open_prompts
from prism_mcore.rl.settings import RLSettings


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts"))


def settings(files, runs, **sections):
    defaults = {
        "rl": {
            "prompts": [{"path": str(files / "prompts.jsonl")}],
            "tokenizer": str(files),
            "context": 24,
            "prompts_per_step": 3,
            "kl_coefficient": 0.0,
            "show": 0,
        },
        "rewards": {"require_think": False, "workers": 1, "repetition_penalty": 0.0},
        "sampling": {
            "samples": 3,
            "max_tokens": 5,
            "stop_ids": list(range(4, 16)),
        },  # a stop earns 0.1: some groups have spread
        "train": {"steps": 4},
        "optimizer": {"lr": 1e-2, "schedule": "constant", "weight_decay": 0.0},
    }
    return settings_of(RLSettings, runs, "dense", defaults, sections)


def train(groups, settings, steps=None):
    """Run the loop for so many steps; the groups that each step trained on, and this rank's state."""
    from prism_mcore.rl import loop

    prompts = open_prompts(settings, resolve_spec(settings.model))
    seen, update = [], loop.update_policy

    def watched(run, step, groups, lr):
        seen.append(groups)
        return update(run, step, groups, lr)

    with ExitStack() as opened:
        run = loop.build(settings, prompts, groups, torch.device("cpu"), opened)
        loop.update_policy = watched
        try:
            assert loop.train(run) == DONE
        finally:
            loop.update_policy = update
        return seen, state_of(run), run.asked


DYNAMIC = {"rl": {"dynamic_sampling": 8}, "optimizer": {"lr": 1e-4}}  # else it soon always stops


def test_every_group_has_spread_and_no_prompt_is_asked_twice_for_nothing(files, tmp_path):
    ((seen, _, asked),) = run_ranks(1, train, settings(files, tmp_path, **DYNAMIC))
    assert [len(groups) for groups in seen] == [3] * 4
    assert all(has_spread(group) for groups in seen for group in groups)
    drawn = [line["groups/drawn"] for line in records(tmp_path)]
    assert sum(drawn) == asked > 12 and all(count % 3 == 0 for count in drawn)
    keys = [rollout.key for groups in seen for group in groups for rollout in group.rollouts]
    assert len(set(keys)) == len(keys)


def test_draws_are_bounded(files, tmp_path):
    ((seen, _, asked),) = run_ranks(
        1,
        train,
        settings(files, tmp_path, rl={"dynamic_sampling": 2}, rewards={"stop_token_penalty": 0.0}, train={"steps": 2}),
    )
    assert asked == 12 and all(len(groups) < 3 for groups in seen)


def test_two_and_two_steps_ask_what_four_do(files, tmp_path):
    want = run_ranks(2, train, settings(files, tmp_path / "whole", **DYNAMIC))
    run_ranks(2, train, settings(files, tmp_path / "parts", **DYNAMIC, train={"steps": 2}))
    got = run_ranks(2, train, settings(files, tmp_path / "parts", **DYNAMIC))
    for (before, state, asked), (after, resumed, same) in zip(want, got, strict=True):
        assert_same_state(state, resumed)
        assert asked == same
        assert [g.prompt.index for gs in before[2:] for g in gs] == [g.prompt.index for gs in after for g in gs]
        assert len(after) == 2 and [r.tokens for g in before[3] for r in g.rollouts] == [
            r.tokens for g in after[1] for r in g.rollouts
        ]


def test_the_kl_in_the_reward_is_that_to_the_reference(files, tmp_path):
    sections = {"rl": {"kl_in": "reward", "kl_coefficient": 0.5, "kl": "k1", "advantage": "rloo"}}
    results = {}
    for name, ranks, degrees in (("one", 1, {}), ("two", 2, {}), ("tp", 2, {"tp": 2, "sequence_parallel": True})):
        # Adam's first step is the sign of a gradient, be it rounding; with a large eps it is the gradient.
        optimizer = {"lr": 0.5, "eps": 1.0}
        wanted = settings(files, tmp_path / name, **sections, parallel=degrees, optimizer=optimizer)
        results[name] = run_ranks(ranks, train, wanted, **degrees)[0][0]
    first = [rollout.rewards["kl"] for group in results["one"][0] for rollout in group.rollouts]
    assert all(abs(kl) < 1e-5 for kl in first)  # the policy is the reference still
    later = [rollout.rewards["kl"] for group in results["one"][3] for rollout in group.rollouts]
    assert max(map(abs, later)) > 1e-3
    for name in ("two", "tp"):
        kls = [rollout.rewards["kl"] for group in results[name][1] for rollout in group.rollouts]
        assert kls == pytest.approx([r.rewards["kl"] for g in results["one"][1] for r in g.rollouts], abs=1e-4)


def test_a_soft_punishment_is_part_of_the_reward(files, tmp_path):
    wanted = settings(files, tmp_path, rl={"overlong": "soft", "overlong_buffer": 2}, train={"steps": 1})
    ((seen, _, _),) = run_ranks(1, train, wanted)
    for rollout in (r for groups in seen for group in groups for r in group.rollouts):
        assert rollout.rewards["overlong"] == pytest.approx(-max(0.0, (len(rollout.tokens) - 3) / 2))
