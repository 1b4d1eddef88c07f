"""megatron-core on CPU ranks: every layout computes the same gradients and the same updates."""

import functools

import pytest
import torch
from ranks import run_ranks

from prism_mcore.parallel import ParallelSettings, data_parallel_size


def merge(of_ranks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One dict of the stages' dicts; ranks that hold the same tensor must hold the same values."""
    merged: dict[str, torch.Tensor] = {}
    for tensors in of_ranks:
        for name, tensor in tensors.items():
            if name in merged:
                torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-7)
            merged[name] = tensor
    return merged


def gradients(groups, sequence_parallel):
    from tiny.toy import Toy  # here, not above: only the ranks import megatron-core

    toy = Toy(groups, sequence_parallel)
    loss = torch.tensor(toy.gradients(step=0))
    # With the distributed optimizer a rank's main_grad is only reduced in its own shard.
    for chunk in toy.chunks:
        for buffer in chunk.buffers:
            torch.distributed.all_gather_into_tensor(
                buffer.grad_data, buffer.grad_data.chunk(groups.dp_size)[groups.dp_rank].clone(), group=groups.dp
            )
    if groups.tp_rank == 0:
        torch.distributed.all_reduce(loss, group=groups.dp)
    return (loss.item() if groups.tp_rank == 0 and groups.is_last_stage else None), toy.full("main_grad")


def updated_weights(groups, steps, bf16):
    from tiny.toy import Toy

    toy = Toy(groups, bf16=bf16)
    norms = [toy.step(step)[1] for step in range(steps)]
    return norms, toy.full()


@functools.cache
def one_rank_gradients():
    return run_ranks(1, gradients, False)[0]


@functools.cache
def one_rank_weights(bf16=False):
    return run_ranks(1, updated_weights, 5, bf16)[0]


LAYOUTS = {
    "tp2": (2, {"tp": 2}, False),
    "tp2_sp": (2, {"tp": 2}, True),
    "pp2": (2, {"pp": 2}, False),
    "pp2_vpp2": (2, {"pp": 2, "vpp": 2}, False),
    "dp2": (2, {}, False),
    "tp2_pp2_sp": (4, {"tp": 2, "pp": 2}, True),
    "dp2_pp2": (4, {"pp": 2}, False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_do_not_depend_on_the_layout(layout):
    world_size, settings, sequence_parallel = LAYOUTS[layout]
    answers = run_ranks(world_size, gradients, sequence_parallel, **settings)
    loss, expected = one_rank_gradients()
    for rank_loss, _ in answers:
        assert rank_loss is None or rank_loss == pytest.approx(loss, rel=1e-5)
    assert any(rank_loss is not None for rank_loss, _ in answers)
    got = merge([tensors for _, tensors in answers])
    assert got.keys() == expected.keys()
    for name in expected:
        assert expected[name].abs().max() > 0, name
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6 * expected[name].abs().max().item())


@pytest.mark.parametrize(
    ("world_size", "layout"), [(2, {}), (2, {"tp": 2}), (2, {"pp": 2, "vpp": 2}), (4, {"optimizer_instances": 2})]
)
def test_distributed_optimizer_updates_like_one_rank(world_size, layout):
    answers = run_ranks(world_size, updated_weights, 5, False, **layout)
    norms, expected = one_rank_weights()
    got = merge([weights for _, weights in answers])
    for rank_norms, _ in answers:
        assert rank_norms == pytest.approx(norms, rel=1e-5)
    assert norms[-1] != norms[0]
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)


def test_bf16_weights_with_fp32_master_copies():
    _, fp32 = one_rank_weights()
    _, one = one_rank_weights(bf16=True)
    got = merge([weights for _, weights in run_ranks(2, updated_weights, 5, True)])
    for name in fp32:
        assert torch.equal(one[name], one[name].bfloat16().float()), name
        # As a whole: Adam turns rounding of a gradient that is nearly zero into a step in either direction.
        assert (got[name] - one[name]).norm() < 0.2 * one[name].norm(), name
        assert (one[name] - fp32[name]).norm() < 0.2 * fp32[name].norm(), name


def places(groups):
    fields = "rank tp_rank tp_size pp_rank pp_size dp_rank dp_size cp_size is_first_stage is_last_stage"
    return [getattr(groups, field) for field in fields.split()]


def test_ranks_are_laid_out_tensor_parallel_fastest_pipeline_slowest():
    assert run_ranks(4, places, tp=2, pp=2) == [
        [0, 0, 2, 0, 2, 0, 1, 1, True, False],
        [1, 1, 2, 0, 2, 0, 1, 1, True, False],
        [2, 0, 2, 1, 2, 0, 1, 1, False, True],
        [3, 1, 2, 1, 2, 0, 1, 1, False, True],
    ]


def random_numbers(groups):
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        apart = torch.rand(1).item()
    return apart, torch.rand(1).item()


def test_tensor_parallel_ranks_draw_apart_inside_the_tracker_and_together_outside():
    (apart_0, together_0), (apart_1, together_1) = run_ranks(2, random_numbers, tp=2)
    assert apart_0 != apart_1
    assert together_0 == together_1


def test_degrees_that_do_not_divide_the_ranks_are_refused():
    with pytest.raises(ValueError, match=r"6 ranks cannot be divided into parallel.tp=2 x pp=2 x cp=1 = 4"):
        data_parallel_size(ParallelSettings(tp=2, pp=2), 6)
    with pytest.raises(ValueError, match="optimizer_instances=3"):
        data_parallel_size(ParallelSettings(optimizer_instances=3), 8)
    assert data_parallel_size(ParallelSettings(tp=2, pp=2, optimizer_instances=2), 16) == 4
