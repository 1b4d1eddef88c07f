"""The Triton AdamW and the optimizer around it against torch.optim.AdamW."""

import copy
from typing import Any

import pytest
import torch
from tiny.accuracy import DEVICE, randn

from prism_kernels.adamw import reference
from prism_kernels.adamw import triton as kernel
from prism_kernels.adamw.triton import BLOCK, FusedAdamW, adamw
from prism_kernels.backends import Uncovered

SIZES = [BLOCK * 2 + 8, 1, 7, 64, 0, BLOCK]  # blocks and rests; 7 and 1 do not fill 16-byte accesses
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.1}


def random_tensors(scale=1.0):
    return [randn(n, dtype=torch.float32, scale=scale).to(DEVICE) for n in SIZES]


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [adamw, reference.adamw], ids=["triton", "reference"])
def test_three_steps_equal_torch(op, grad_dtype):
    torch.manual_seed(0)
    start = random_tensors()
    theirs = [x.double().requires_grad_() for x in start]
    optimizer = torch.optim.AdamW(theirs, **SETTINGS)
    params, exp_avgs, exp_avg_sqs = start, [torch.zeros_like(x) for x in start], [torch.zeros_like(x) for x in start]
    copies = [torch.full_like(x, torch.nan, dtype=torch.bfloat16) if i % 2 else None for i, x in enumerate(start)]
    for step in (1, 2, 3):
        grads = [x.to(grad_dtype) for x in random_tensors(1e-3)]
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.double() * 0.5
        optimizer.step()
        op(params, grads, exp_avgs, exp_avg_sqs, copies, step=step, grad_scale=0.5, **SETTINGS)
    for param, exact, first, second, rounded in zip(params, theirs, exp_avgs, exp_avg_sqs, copies, strict=True):
        state = optimizer.state[exact]
        torch.testing.assert_close(param, exact.detach().float(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(first, state["exp_avg"].float(), rtol=1e-5, atol=1e-10)
        torch.testing.assert_close(second, state["exp_avg_sq"].float(), rtol=1e-5, atol=1e-14)
        assert rounded is None or torch.equal(rounded, param.bfloat16())


def test_shards_that_start_anywhere_in_a_buffer():
    torch.manual_seed(0)
    buffers = [randn(100, dtype=torch.float32).to(DEVICE).abs() for _ in range(4)]
    before, whole = buffers[0].clone(), [x.clone() for x in buffers]
    model = torch.zeros(100, device=DEVICE, dtype=torch.bfloat16)
    cuts = [slice(0, 3), slice(3, 35), slice(35, 40), slice(40, 72), slice(80, 100)]  # wide accesses fit one of them
    shards = [[x[cut] for cut in cuts] for x in (*buffers, model)]
    adamw(shards[0], shards[1], shards[2], shards[3], shards[4], step=5, **SETTINGS)
    adamw(whole[:1], whole[1:2], whole[2:3], whole[3:], [None], step=5, **SETTINGS)
    for i, (mine, exact) in enumerate(zip(buffers, whole, strict=True)):
        inside = torch.cat([exact[cut] for cut in cuts])
        assert torch.equal(torch.cat([mine[cut] for cut in cuts]), inside), f"tensor {i}"
    assert torch.equal(buffers[0][72:80], before[72:80]) and not model[72:80].any()  # what lies between is not touched
    assert torch.equal(model[:72], buffers[0][:72].bfloat16())


def test_tensors_of_a_kind_share_one_launch(monkeypatch):
    grids = []

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return launch[grid]

    launch = kernel.adamw_kernel
    monkeypatch.setattr(kernel, "adamw_kernel", Recorded())
    tensors = [[torch.ones(n, device=DEVICE) for n in (BLOCK + 8, 16, 24)] for _ in range(4)]
    adamw(tensors[0], tensors[1], tensors[2], tensors[3], [None] * 3, step=1, **SETTINGS)
    assert grids == [(4,)]  # blocks of BLOCK elements


def train(optimizer_of, steps, state=None):
    """Parameters after these steps of two groups of different decay, the second without a gradient every other step."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(randn(n, dtype=torch.float32).to(DEVICE)) for n in (130, 9)]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "weight_decay": 0.0}]
    optimizer = optimizer_of(groups, **SETTINGS)
    for step in range(steps):
        if state is not None and step == 3:
            optimizer.load_state_dict(copy.deepcopy(state))
        for i, param in enumerate(params):
            grad = randn(len(param), dtype=torch.float32).to(DEVICE)
            param.grad = None if i and step % 2 else grad
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        optimizer.step()
    return [p.detach() for p in params], optimizer


def test_the_optimizer_steps_as_torch_does_and_its_state_is_torch_s():
    ours, optimizer = train(FusedAdamW, 5)
    theirs, torchs = train(torch.optim.AdamW, 5)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    state, expected = optimizer.state_dict()["state"], torchs.state_dict()["state"]
    assert {k: set(v) for k, v in state.items()} == {k: set(v) for k, v in expected.items()}
    assert [int(state[i]["step"]) for i in (0, 1)] == [5, 3]


def test_a_loaded_state_continues_to_the_bit():
    whole, _ = train(FusedAdamW, 6)
    _, at_three = train(FusedAdamW, 3)
    resumed, _ = train(FusedAdamW, 6, state=at_three.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_copies_follow_and_a_scale_holds_for_one_step():
    param = torch.nn.Parameter(torch.ones(20, device=DEVICE))
    model = torch.zeros(20, device=DEVICE, dtype=torch.bfloat16)
    optimizer = FusedAdamW([param], copies={param: model}, **SETTINGS)
    optimizer.grad_scale = 0.25
    for scale in (0.25, 1.0):
        param.grad = torch.full_like(param, 4.0)
        before = optimizer.state[param]["exp_avg"].clone() if optimizer.state[param] else torch.zeros_like(param)
        optimizer.step()
        torch.testing.assert_close(optimizer.state[param]["exp_avg"], 0.9 * before + 0.1 * 4.0 * scale)
        assert torch.equal(model, param.detach().bfloat16())


def test_what_the_kernel_does_not_cover_is_named():
    x = torch.ones(8, device=DEVICE)
    with pytest.raises(Uncovered, match="exp_avg is bfloat16: needs float32"):
        adamw([x], [x], [x.bfloat16()], [x], [None], step=1, **SETTINGS)
    with pytest.raises(Uncovered, match="grad is float64"):
        adamw([x], [x.double()], [x], [x], [None], step=1, **SETTINGS)
    with pytest.raises(Uncovered, match="not contiguous"):
        adamw([x], [x.expand(8, 8)[:, 0]], [x], [x], [None], step=1, **SETTINGS)
