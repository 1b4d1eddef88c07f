"""What the metrics of rollouts and updates mean."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny.rollouts import group_of, rollout

from prism_mcore.console import show
from prism_mcore.rl.metrics import RLMetrics, rollout_metrics, rollout_table, update_metrics
from prism_mcore.rl.step import Gap, PolicyStats


def test_a_group_without_a_verdict_is_solved_neither_by_all_nor_by_none():
    right, wrong = group_of(rollout([9], 1.0), rollout([9], 1.0)), group_of(rollout([9], 0.0), rollout([9], 0.0))
    lost = group_of(*(rollout([9], valid=False) for _ in range(2)))
    found = rollout_metrics([right, wrong, lost, group_of(rollout([9], 1.0), rollout([9], 0.0))])
    assert (found["groups/solve_all"], found["groups/solve_none"]) == (0.25, 0.25)
    assert found["reward/mean"] == pytest.approx(0.5)


def test_a_response_that_a_stop_text_ends_is_not_truncated():
    ends = [("stop", True), ("stop", False), ("length", False), ("context", False)]
    group = group_of(*(replace(rollout([9]), finish=finish, stop_token=token) for finish, token in ends))
    assert rollout_metrics([group])["rollout/truncated"] == 0.5


STATS = PolicyStats(
    loss=0.5,
    grad_norm=1.0,
    tokens=100,
    on_policy=100,
    means={"entropy": 2.0, "kl": 0.0},
    ratio_max=1.5,
    gap_mean=0.02,
    gap=Gap(0.1, 3, 1),
    losses=torch.zeros(0),
)


def test_means_of_a_step_are_over_its_updates_tokens_the_gaps_over_those_that_have_one():
    second = replace(
        STATS,
        tokens=300,
        on_policy=0,
        means={"entropy": 1.0, "kl": 0.0},
        gap_mean=0.0,
        gap=Gap(0.0, -1, -1),
        ratio_max=2.0,
    )
    found = update_metrics([STATS, second])
    assert found["entropy"] == pytest.approx(1.25) and found["ratio_max"] == 2.0
    assert found["rl/logprob_gap_mean"] == pytest.approx(0.02) and found["rl/logprob_gap_max"] == 0.1


def test_the_console_says_how_many_responses_could_not_be_verified():
    lost = replace(rollout([9], valid=False), verifier="crash")
    for group, shown in ((group_of(rollout([9]), lost), True), (group_of(rollout([9]), rollout([9])), False)):
        record = {"step": 1, "lr": 0.1, "generation/tokens_per_s": 10.0}
        record |= rollout_metrics([group]) | update_metrics([STATS])
        line = RLMetrics._line(SimpleNamespace(steps=2, _step_times=[1.0]), record)
        assert ("| not verified 1 of 2 |" in line) == shown


def test_the_console_says_that_nothing_was_learnt_or_verified_where_there_is_no_number():
    lost = group_of(replace(rollout([9], valid=False), verifier="crash"))
    record = {"step": 1, "lr": 0.1, "generation/tokens_per_s": 10.0} | rollout_metrics([lost]) | update_metrics([])
    line = RLMetrics._line(SimpleNamespace(steps=2, _step_times=[1.0]), record, learnt=False)
    assert "nan" not in line and "| nothing to learn |" in line and "not verified 1 of 1" in line


@pytest.mark.parametrize("text", [r"Factor \[/y] now", r"\[x^2\]", "[red]3[/red]", "[", "a\\"])
def test_prompts_responses_and_answers_are_shown_as_they_are(text, capsys):
    group = group_of(rollout([9]), rollout([9]))
    group = replace(group, prompt=replace(group.prompt, text=text, record={"answer": text}))
    show(rollout_table([group], lambda tokens, stop_token: text, 1), stderr=True)
    assert capsys.readouterr().err.count(text) == 3


def test_what_a_terminal_would_obey_is_written_out(capsys):
    group = group_of(rollout([9]), rollout([9]))
    show(rollout_table([group], lambda tokens, stop_token: "\x1b[2J\x07", 1), stderr=True)
    assert r"\x1b[2J\x07" in capsys.readouterr().err
