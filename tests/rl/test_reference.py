"""The reference policy in the model's buffers: its own weights come back to the bit, its log-probs are the start's."""

import pytest
import torch
from ranks import run_ranks
from tiny.policies import batches_of, open_policy

from prism_mcore.rl.settings import PolicySettings


def in_place_and_back(groups, spec, dtype, overlap):
    from prism_mcore.rl.reference import Reference
    from prism_mcore.rl.step import policy_backward, score
    from prism_mcore.train.optimizer import gathered_parameters, update

    settings = PolicySettings(kl_coefficient=0.0)
    chunks, optimizer = open_policy(groups, spec, dtype, overlap)
    batches = batches_of(groups, spec, settings)
    reference = Reference(chunks, optimizer, groups)
    start = score(chunks, batches)
    for _ in range(2):
        update(optimizer, policy_backward(chunks, optimizer, batches, settings, groups).grad_norm, 1e-2)
    moved = score(chunks, batches)
    with gathered_parameters(chunks), reference.in_place():
        scored = score(chunks, batches)
    again = score(chunks, batches)
    stats = policy_backward(
        chunks, optimizer, batches, settings, groups
    )  # the optimizer goes on as if nothing had been
    assert all(torch.equal(a, b) for a, b in zip(start, scored, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(moved, again, strict=True))
    assert not torch.equal(start[0], moved[0])
    return stats.loss, stats.grad_norm


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("spec", "ranks", "layout", "overlap"),
    [
        ("hybrid", 2, {}, False),
        ("hybrid", 2, {}, True),
        ("granite hybrid", 2, {"tp": 2, "sequence_parallel": True}, False),
        ("dense", 4, {"optimizer_instances": 2}, False),
    ],
)
def test_the_reference_is_scored_in_place_and_the_policy_comes_back(spec, ranks, layout, overlap, dtype):
    results = run_ranks(ranks, in_place_and_back, spec, dtype, overlap, **layout)
    assert len(set(results)) == 1


def spoilt_restoration(groups):
    from prism_mcore.rl.reference import Reference

    chunks, optimizer = open_policy(groups, "dense", "bf16")
    reference = Reference(chunks, optimizer, groups)
    with reference.in_place():
        if groups.rank == 1:
            reference._shards[-1].master[0] += 1


def test_a_weight_that_does_not_come_back_is_noticed():
    with pytest.raises(Exception, match="not what they were before the reference was scored"):
        run_ranks(2, spoilt_restoration)


def soft_update(groups):
    from prism_mcore.rl.reference import Reference
    from prism_mcore.rl.step import policy_backward
    from prism_mcore.train.optimizer import update

    settings = PolicySettings(kl_coefficient=0.0)
    chunks, optimizer = open_policy(groups, "dense", "bf16")
    reference = Reference(chunks, optimizer, groups)
    batches = batches_of(groups, "dense", settings)
    old = [shard.reference.clone() for shard in reference._shards]
    update(optimizer, policy_backward(chunks, optimizer, batches, settings, groups).grad_norm, 1e-2)
    reference.update(0.25)
    for shard, before in zip(reference._shards, old, strict=True):
        torch.testing.assert_close(shard.reference, 0.25 * shard.master + 0.75 * before)
    assert any(not torch.equal(shard.reference, before) for shard, before in zip(reference._shards, old, strict=True))


def test_a_soft_update_mixes_masters_into_the_reference():
    run_ranks(2, soft_update)


def whole_reference(reference, parameter):
    """Added as integers: the other ranks' zeros then change no bit."""
    whole = torch.zeros(parameter.numel())
    for shard in reference._shards:
        if shard.parameter is parameter:
            whole[shard.start : shard.start + len(shard.reference)] = shard.reference
    torch.distributed.all_reduce(whole.view(torch.int32), group=reference.chunks[0].intra_dp_cp_group)
    return whole


def kept_in_a_checkpoint(groups, folder, load):
    from prism_mcore.checkpoint.load import load as load_checkpoint
    from prism_mcore.checkpoint.save import Checkpoints
    from prism_mcore.rl.reference import Reference
    from prism_mcore.train.settings import CheckpointSettings

    chunks, optimizer = open_policy(groups, "granite hybrid", "bf16")
    reference = Reference(chunks, optimizer, groups)
    models = [chunk.module for chunk in chunks]
    if load:
        for shard in reference._shards:
            shard.reference.zero_()
        load_checkpoint(folder / "step_00000001", models, optimizer, groups, {"reference.": reference.owned()})
    else:
        for shard in reference._shards:
            shard.reference.mul_(1.5).sub_(1 / 3)
        more = {"reference.": reference.owned()}
        Checkpoints(folder, CheckpointSettings(), groups).save(1, models, optimizer, {}, more)
    return {name: whole_reference(reference, tensor) for chunk in models for name, tensor, _ in chunk.table()}


def test_the_reference_is_saved_whole_and_loads_in_the_same_layout(tmp_path):
    saved = run_ranks(2, kept_in_a_checkpoint, tmp_path, False)
    loaded = run_ranks(2, kept_in_a_checkpoint, tmp_path, True)
    for a, b in zip(saved, loaded, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a) and len(a) > 10
    (alone,) = run_ranks(1, kept_in_a_checkpoint, tmp_path, True)
    assert all(torch.equal(alone[name], saved[0][name]) for name in alone)
