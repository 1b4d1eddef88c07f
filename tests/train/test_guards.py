"""Bad steps are recognised, agreed on by all ranks, dumped, and stop the run beyond the budget."""

import json
import math
from dataclasses import replace

import pytest
import torch
from ranks import RankError, run_ranks
from safetensors.torch import load_file

from prism_mcore.batch import PackedBatch
from prism_mcore.train.settings import GuardSettings


def batch_of(rank, micro_batch):
    """Two sequences of 3 tokens; the second one has no label that counts."""
    first = 100 * rank + 2 * micro_batch
    return PackedBatch(
        tokens=torch.full((2, 3), first),
        labels=torch.full((2, 3), first + 1),
        loss_mask=torch.tensor([[True, True, True], [False, False, False]]),
        position_ids=torch.arange(3).repeat(2, 1),
        seq_idx=torch.zeros(2, 3, dtype=torch.int32),
        cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32),
        max_seqlen=3,
        num_tokens=3,
        source_ids=torch.tensor([micro_batch, 0], dtype=torch.int32),
        sample_ids=torch.tensor([first, first + 1]),
    )


def stats(loss, grad_norm=1.0, rows=((2.0,), (3.0,))):
    from prism_mcore.train.step import StepStats

    sums = [torch.tensor([[3 * row[0], 3.0], [0.0, 0.0]]) for row in rows]  # the second sequence has no label
    return StepStats(loss, grad_norm, (loss, loss), (3, 3), sums)


def decisions(groups, folder, settings, steps):
    """What the guard says to a list of (loss, gradient norm, row losses by rank)."""
    from prism_mcore.train.guards import Guard

    guard = Guard(GuardSettings(**settings), folder, groups)
    batches = [batch_of(groups.rank, 0), batch_of(groups.rank, 1)]
    return [
        guard.admits(step, stats(loss, norm, rows[groups.rank] if rows else ((2.0,), (3.0,))), batches)
        for step, (loss, norm, rows) in enumerate(steps, start=1)
    ]


GOOD = (2.5, 1.0, None)


def test_good_steps_pass_and_leave_nothing(tmp_path):
    assert run_ranks(2, decisions, tmp_path, {}, [GOOD] * 3) == [[True] * 3] * 2
    assert list(tmp_path.iterdir()) == []


def test_nan_is_skipped_within_the_budget_and_names_rank_source_and_sample(tmp_path):
    nan = (math.nan, math.nan, [((2.0,), (3.0,)), ((2.0,), (math.nan,))])  # rank 1, micro-batch 1
    assert run_ranks(2, decisions, tmp_path, {"skip_budget": 1}, [GOOD, nan, GOOD]) == [[True, False, True]] * 2
    with pytest.raises(RankError) as error:
        run_ranks(2, decisions, tmp_path, {"skip_budget": 1}, [nan, GOOD, nan])
    for report in error.value.reports.values():
        assert "GuardStop: step 3: the loss is nan" in report
        assert "Suspects: rank 0: sample 2 of data.sources[1] (loss 3)" in report
        assert "rank 1: sample 102 of data.sources[1] (loss nan)" in report
        assert "Bad steps so far: 2, guards.skip_budget=1" in report


def test_the_batch_of_a_bad_step_is_dumped(tmp_path):
    with pytest.raises(RankError, match="the gradient norm is inf"):
        run_ranks(2, decisions, tmp_path, {}, [GOOD, (2.5, math.inf, None)])
    folder = tmp_path / "bad_steps" / "step_00000002"
    expected = ["rank_0.json", "rank_0.safetensors", "rank_1.json", "rank_1.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == expected
    tensors = load_file(folder / "rank_1.safetensors")
    assert torch.equal(tensors["1.tokens"], batch_of(1, 1).tokens)
    assert torch.equal(tensors["0.cu_seqlens"], batch_of(1, 0).cu_seqlens)
    record = json.loads((folder / "rank_1.json").read_text())
    assert record["samples"] == [[100, 101], [102, 103]]
    assert record["grad_norm"] == "inf"


def test_a_spike_is_measured_by_the_median_of_good_steps(tmp_path):
    settings = {"spike_threshold": 2.0, "spike_window": 3, "skip_budget": 5}
    losses = [9.0, 2.0, 2.0, 4.1, 3.9, 8.0, 2.0]  # no yardstick before three; 4.1 and 8.0 are spikes and do not count
    (decided,) = run_ranks(1, decisions, tmp_path, settings, [(loss, 1.0, None) for loss in losses])
    assert decided == [True, True, True, False, True, False, True]


def nothing_counts(groups, folder):
    from prism_mcore.train.guards import Guard

    guard = Guard(GuardSettings(skip_budget=0), folder, groups)
    masked = replace(stats(math.nan, math.nan), source_tokens=(0, 0))
    admitted = guard.admits(1, masked, [batch_of(groups.rank, 0), batch_of(groups.rank, 1)])
    return admitted, guard.state()


def test_a_step_without_a_label_that_counts_is_neither_applied_nor_charged(tmp_path):
    assert run_ranks(2, nothing_counts, tmp_path) == [(False, {"skipped": 0, "good_losses": []})] * 2
    assert list(tmp_path.iterdir()) == []


def skips_after_resume(groups, folder):
    from prism_mcore.train.guards import Guard, GuardStop

    settings = GuardSettings(skip_budget=1, spike_threshold=2.0, spike_window=2)
    batches = [batch_of(0, 0), batch_of(0, 1)]
    first = Guard(settings, folder, groups)
    assert first.admits(1, stats(2.0), batches) and first.admits(2, stats(2.0), batches)
    assert not first.admits(3, stats(math.nan), batches)
    resumed = Guard(settings, folder, groups)
    resumed.restore(json.loads(json.dumps(first.state())))
    try:
        resumed.admits(4, stats(5.0), batches)
    except GuardStop as stop:
        return str(stop)


def test_budget_and_yardstick_survive_a_resume(tmp_path):
    (message,) = run_ranks(1, skips_after_resume, tmp_path)
    assert "the loss 5.0000 is above 2 times its median 2.0000" in message
    assert "Bad steps so far: 2" in message
