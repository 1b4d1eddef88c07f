"""rl.token_budget: rollouts in parts over several steps, each token with the version of the weights that sampled it."""

import os
import signal
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny.policies import open_policy
from tiny.prompt_files import write_prompts
from tiny.rollouts import group_of, rollout
from tiny.runs import assert_same_state, records, settings_of, state_of

from prism_mcore.batch import RolloutGroup
from prism_mcore.config import SettingsError
from prism_mcore.exit_codes import DONE, STOPPED_BY_SIGNAL
from prism_mcore.generate import Request
from prism_mcore.model.settings import resolve_spec
from prism_mcore.rl import unfinished
from prism_mcore.rl.checks import check
from prism_mcore.rl.packing import pack, samples_of
from prism_mcore.rl.prompts import open_prompts
from prism_mcore.rl.rollout import UNFINISHED, dealt
from prism_mcore.rl.settings import PolicySettings, RLSettings

BUDGET, STEPS = 3, 5


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts"))


def settings(files, runs, spec="granite hybrid", **sections):
    defaults = {
        "rl": {
            "prompts": [{"path": str(files / "prompts.jsonl")}],
            "tokenizer": str(files),
            "context": 24,
            "prompts_per_step": 4,
            "kl_coefficient": 0.02,
            "token_budget": BUDGET,
            "parity": "exact",
            "show": 0,
        },
        "rewards": {"require_think": False, "workers": 1},
        "sampling": {"samples": 3, "max_tokens": 10, "stop_ids": [5, 9, 14]},
        "train": {"steps": STEPS},
        "optimizer": {"lr": 1e-2, "schedule": "linear", "weight_decay": 0.0},
    }
    return settings_of(RLSettings, runs, spec, defaults, sections)


def train(groups, settings, until=None):
    """Run the loop, stopping by a signal after `until` steps; the exit code, what was generated, this rank's state."""
    from prism_mcore.rl import loop

    prompts = open_prompts(settings, resolve_spec(settings.model))
    with ExitStack() as opened:
        run = loop.build(settings, prompts, groups, torch.device("cpu"), opened)
        steps, generate = [], run.rollouts.generate

        def watched(*arguments, **of_step):
            steps.append(generate(*arguments, **of_step))
            if of_step["step"] == until and groups.rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return steps[-1]

        run.rollouts.generate = watched
        return loop.train(run), steps, state_of(run)


def test_rollouts_in_parts_are_trained_on_when_their_group_is_done(files, tmp_path):
    """The gate of rl.parity=exact sees tokens of the current version alone, and finds not one bit."""
    ((code, made, _),) = run_ranks(1, train, settings(files, tmp_path, train={"steps": 8}))
    assert code == DONE
    for step, groups in enumerate(made, 1):
        for one in (one for group in groups for one in group.rollouts):
            gained = int((one.versions == step - 1).sum())
            assert gained <= BUDGET and (one.finish != UNFINISHED or gained == BUDGET)
            assert list(one.versions) == sorted(one.versions) and len(one.tokens) <= 10
            assert (one.finish == UNFINISHED) == (one.verifier == "ok" and not one.valid)
    lines = records(tmp_path)
    assert [line["rollout/unfinished"] for line in lines] == [
        sum(one.finish == UNFINISHED for group in groups for one in group.rollouts) for groups in made
    ]
    assert any(len(set(one.versions)) > 2 for groups in made for group in groups for one in group.rollouts)
    done = [sum(all(r.finish != UNFINISHED for r in group.rollouts) for group in groups) for groups in made]
    assert [line["rollout/count"] for line in lines] == [3 * count for count in done] and done[0] < 4
    assert all(line["rl/logprob_gap_max"] in (0, None) for line in lines)
    assert max(line["ratio_max"] or 0 for line in lines) > 1.001  # stale tokens weigh by what the weights did since


@pytest.mark.parametrize("ranks", [1, 2])
def test_stop_and_resume_with_rollouts_in_the_middle(files, tmp_path, ranks):
    want = run_ranks(ranks, train, settings(files, tmp_path / "whole"))
    first = run_ranks(ranks, train, settings(files, tmp_path / "parts"), 2)
    assert {code for code, _, _ in first} == {STOPPED_BY_SIGNAL}
    assert any(r.finish == UNFINISHED for group in first[0][1][-1] for r in group.rollouts)
    got = run_ranks(ranks, train, settings(files, tmp_path / "parts"))
    for (_, before, state), (_, after, resumed) in zip(want, got, strict=True):
        assert_same_state(state, resumed)
        for whole, part in zip(before[2:], after, strict=True):
            assert [identity(group) for group in whole] == [identity(group) for group in part]


def identity(group):
    return group.prompt.index, [
        (r.key, r.tokens, r.logprobs.tobytes(), r.versions.tobytes(), r.finish, r.rewards) for r in group.rollouts
    ]


def test_replicas_make_the_rollouts_of_one(files, tmp_path):
    ((_, want, _),) = run_ranks(1, train, settings(files, tmp_path / "one", train={"steps": 2}))
    for _, got, _ in run_ranks(2, train, settings(files, tmp_path / "two", train={"steps": 2})):
        for one, two in zip(want, got, strict=True):
            assert [[r.tokens for r in g.rollouts] for g in one] == [[r.tokens for r in g.rollouts] for g in two]


def without_learning(groups, settings):
    """With weights that stay, what was made in parts, and the same samples in one go."""
    from prism_mcore.rl import loop

    prompts = open_prompts(settings, resolve_spec(settings.model))
    with ExitStack() as opened:
        run = loop.build(settings, prompts, groups, torch.device("cpu"), opened)
        done = [group for step in range(1, 9) for group in loop.training_rollouts(run, step)]
        requests = [Request(group.prompt.tokens, tuple(r.key for r in group.rollouts)) for group in done]
        whole = {(c.request, c.sample): c for c in run.rollouts.engine.stream(requests, settings.sampling)}
        return done, whole


def test_parts_make_the_response_that_one_step_would(files, tmp_path):
    ((done, whole),) = run_ranks(1, without_learning, settings(files, tmp_path))
    assert len(done) > 4 and any(len(r.tokens) > 2 * BUDGET for group in done for r in group.rollouts)
    for place, group in enumerate(done):
        for number, one in enumerate(group.rollouts):
            want = whole[place, number]
            assert (one.tokens, one.finish) == (want.tokens, want.finish)
            assert np.array_equal(one.logprobs, want.logprobs)


def planted(groups, place, nats):
    """The stats of an update on a rollout of which the log-prob of one token is off by some nats."""
    from prism_mcore.rl.step import policy_backward, score

    settings = PolicySettings(kl_coefficient=0.0, clip_high=100.0)
    chunks, optimizer = open_policy(groups, "dense")
    samples = samples_of([group_of(rollout([3, 9, 4], 1.0), rollout([8, 2, 5], 0.0))], settings)
    batch = pack(samples, version=7, temperature=1.0)
    logprobs = score(chunks, [batch])[0][0]
    made = []
    for number, sample in enumerate(samples):
        start = int(batch.cu_seqlens[number + 1]) - 3
        of_tokens = logprobs[start : start + 3].numpy().copy()
        of_tokens[place] -= nats if number == 0 else 0.0
        one = replace(sample.rollout, logprobs=of_tokens, versions=np.array([6, 7, 7], np.int32))
        made.append(replace(sample, rollout=one))
    return policy_backward(chunks, optimizer, [pack(made, version=7, temperature=1.0)], settings, groups)


def test_a_stale_token_is_corrected_and_a_current_one_is_a_gap():
    (stale,) = run_ranks(1, planted, 0, 0.5)
    assert stale.ratio_max == pytest.approx(np.exp(0.5), rel=1e-4) and stale.gap.size < 1e-6
    assert (stale.tokens, stale.on_policy) == (6, 4)
    (current,) = run_ranks(1, planted, 1, 0.5)
    assert current.gap.size == pytest.approx(0.5, rel=1e-4) and current.gap.position == 1
    assert current.ratio_max == pytest.approx(1.0, abs=1e-5)


def test_what_is_saved_is_what_was_there(files, tmp_path):
    wanted = settings(files, tmp_path)
    prompts = open_prompts(wanted, resolve_spec(wanted.model)).training
    (prompt,) = prompts.batch(3, 1)
    members = [
        replace(rollout([3, 9], prompt=prompt.tokens, version=4), prompt=prompt.index, finish=UNFINISHED, valid=False),
        replace(rollout([1, 2, 3], 1.0, prompt=prompt.tokens, sample=1), prompt=prompt.index),
    ]
    group = RolloutGroup(prompt, tuple(members))
    record = unfinished.to_record([group])
    (back,), dropped = unfinished.from_record(record, prompts)
    assert dropped == 0 and identity(back) == identity(group) and back.prompt == prompt
    record[0]["tokens"][0] += 1  # the file has changed
    assert unfinished.from_record(record, prompts) == ([], 1)


def test_samples_are_dealt_evenly():
    assert dealt([4, 4, 4, 4], 2) == [[0, 2], [1, 3]]
    assert dealt([1, 1, 1, 4, 4], 2) == [[0, 2, 4], [1, 3]]


def test_settings_that_cannot_work_are_refused(files, tmp_path):
    wanted = settings(files, tmp_path, rl={"updates": 2})
    with pytest.raises(SettingsError, match=r"rl.token_budget=3 and rl.updates=2: nobody knows before"):
        check(wanted, resolve_spec(wanted.model), 1)
    wanted = settings(files, tmp_path, rl={"token_budget": 10})
    assert any("rl.token_budget=10 changes nothing" in note for note in check(wanted, resolve_spec(wanted.model), 1))
