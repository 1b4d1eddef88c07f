"""Masters of a bf16 weight and a 16-bit remainder: nothing is lost, and every step is that of fp32 masters."""

from typing import Any

import pytest
import torch
from tiny.accuracy import DEVICE, randn

from prism_kernels.adamw.remainder import RemainderAdamW, join, split
from prism_kernels.adamw.triton import BLOCK, FusedAdamW, adamw
from prism_kernels.backends import Uncovered

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.1}
SIZES = [BLOCK + 8, 1, 7, 0, 64]


def masters_at_halves():
    """fp32 around every kind of half-way point: even and odd weights, both signs, subnormal, and at the ends."""
    high = torch.tensor([0, 1, 2, 0x3F80, 0x3F81, 0x7F7F - 1, 0x7F, 0x80])
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (high[:, None] * 2**16 + low).flatten()
    return torch.cat([bits, bits - 2**31]).to(torch.int32).view(torch.float32).to(DEVICE)


def test_a_master_is_its_weight_and_its_remainder():
    torch.manual_seed(0)
    masters = torch.cat([masters_at_halves(), randn(10000, dtype=torch.float32).to(DEVICE)])
    weight, remainder, upper = split(masters)
    assert torch.equal(weight, masters.bfloat16()) and remainder.dtype == torch.int16
    assert torch.equal(join(weight, remainder, upper).view(torch.int32), masters.view(torch.int32))
    without = join(weight, remainder, torch.zeros_like(upper))  # the sign is needed, and for halves only
    lost = without.view(torch.int32) != masters.view(torch.int32)
    assert lost.any() and (masters.view(torch.int32)[lost] & 0xFFFF == 0x8000).all()


def train(backend, remainder, steps=4):
    """Masters, weights and moments after some steps from the same start, with fp32 masters or with remainders."""
    torch.manual_seed(0)
    start = [
        torch.cat([masters_at_halves()[:n].clamp(-1e3, 1e3), randn(max(n - 96, 0), dtype=torch.float32).to(DEVICE)])
        for n in SIZES
    ]
    groups = [{"params": list(start[:2])}, {"params": list(start[2:]), "weight_decay": 0.0}]
    if remainder:
        weights = [torch.empty_like(x, dtype=torch.bfloat16) for x in start]
        groups = [{"params": weights[:2]}, {"params": weights[2:], "weight_decay": 0.0}]
        optimizer = RemainderAdamW([SETTINGS | group for group in groups], backend)
        for weight, master in zip(weights, start, strict=True):
            optimizer.pack(weight, optimizer.unpacked(weight) | {"param": master})
    elif backend == "triton":
        optimizer = FusedAdamW(groups, **SETTINGS)
    else:
        optimizer = torch.optim.AdamW(groups, **SETTINGS, foreach=False, fused=backend == "torch")
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(steps):
        for i, param in enumerate(params):
            grad = randn(len(param), dtype=torch.float32).to(DEVICE)
            param.grad = None if step == 2 and i == 4 else grad * (i != 1)  # a moment that stays zero
        optimizer.step()
    if remainder:
        return [(param, *optimizer.unpacked(param).values()) for param in params]
    state = optimizer.state
    return [(p.bfloat16(), p, state[p]["exp_avg"], state[p]["exp_avg_sq"]) for p in params]


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_every_step_is_that_of_fp32_masters(backend):
    for mine, theirs in zip(train(backend, True), train(backend, False), strict=True):
        for got, want in zip(mine, theirs, strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)


def test_without_gradient_and_decay_the_kernel_leaves_every_half_as_it_was():
    masters = masters_at_halves()
    masters = masters[masters.abs() < 1e30]
    weight, remainder, upper = split(masters)
    assert upper.any() and (remainder[~upper] == -0x8000).any()
    first, zero = torch.zeros_like(masters), torch.zeros_like(masters)
    second = torch.where(upper, -0.0, 0.0)
    adamw([remainder], [zero], [first], [second], [weight], step=1, **SETTINGS | {"weight_decay": 0.0})
    normal = masters.abs() >= torch.finfo(torch.float32).tiny
    again = join(weight, remainder, second.signbit())
    assert torch.equal(again[normal], masters[normal]) and torch.equal(second.signbit()[normal], upper[normal])


def test_a_remainder_without_its_bf16_weight_is_refused():
    x = torch.ones(8, device=DEVICE)
    with pytest.raises(Uncovered, match=r"a remainder \(int16\) needs a bfloat16 copy"):
        adamw([x.to(torch.int16)], [x], [x], [x], [None], step=1, **SETTINGS)
