"""What the metrics of rollouts mean."""

from dataclasses import replace

import pytest
from rollouts import group_of, rollout

from prism_mcore.rl.metrics import rollout_metrics


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
