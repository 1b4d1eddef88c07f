"""The decode step's Triton kernel against the reference, and against the scan it continues."""

import pytest
import torch
from tiny.accuracy import DEVICE, randn, relative_error
from tiny.accuracy import kernel_documents as documents

from prism_kernels.backends import Uncovered
from prism_kernels.caches import ScanCache
from prism_kernels.scan import reference
from prism_kernels.scan.inputs import ScanInputs
from prism_kernels.scan.triton import ssd_prefill, ssd_step

LIMIT = (0.01, 2.0)


def step_inputs(rows, dtype, heads=4, groups=2, head_dim=16, state=16):
    """x, dt, A_log, B, C, D, dt_bias, cut from one buffer as the model's are."""
    sizes = [heads * head_dim, groups * state, groups * state, heads]
    x, B, C, dt = randn(rows, sum(sizes), dtype=dtype).split(sizes, -1)
    A_log, D, dt_bias = (randn(heads, dtype=torch.float32) for _ in range(3))
    B, C = (y.unflatten(1, (groups, state)) for y in (B, C))
    inputs = [x.unflatten(1, (heads, head_dim)), dt, A_log, B, C, D, dt_bias]
    return [y.to(DEVICE) for y in inputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "state"), [(16, 16), (24, 40), (64, 128)])
def test_step_equals_the_reference(dtype, head_dim, state):
    torch.manual_seed(0)
    inputs = step_inputs(3, dtype, head_dim=head_dim, state=state)
    slots = torch.tensor([4, 0, 2], device=DEVICE)
    start = randn(6, 4, head_dim, state, dtype=torch.float32).to(DEVICE)
    ours, plain, exact = ScanCache(start.clone()), ScanCache(start.clone()), ScanCache(start.double())
    y = ssd_step(ScanInputs(*inputs, LIMIT), ours, slots, slots)
    theirs = reference.ssd_step(ScanInputs(*inputs, LIMIT), plain, slots, slots)
    best = reference.ssd_step(ScanInputs(*(x.double() for x in inputs), LIMIT), exact, slots, slots)
    eps = torch.finfo(dtype).eps
    assert y.dtype == dtype and relative_error(y, best) <= 2 * relative_error(theirs, best) + eps
    assert relative_error(ours.state, exact.state) <= 1e-6
    assert torch.equal(ours.state[[1, 3, 5]], start[[1, 3, 5]])  # nobody else's state moves


def test_steps_continue_a_scan():
    torch.manual_seed(0)
    inputs = step_inputs(20, torch.float32)
    whole, final = reference.ssd_scan(ScanInputs(*inputs, LIMIT), documents(20), 8, return_final_states=True)
    first = [x[:17] if len(x) == 20 else x for x in inputs]
    _, state = reference.ssd_scan(ScanInputs(*first, LIMIT), documents(17), 8, return_final_states=True)
    cache, slots = ScanCache(state.clone()), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for i in range(17, 20):
        row = ScanInputs(*(x[i : i + 1] if len(x) == 20 else x for x in inputs), LIMIT)
        y = ssd_step(row, cache, slots, slots + i)
        torch.testing.assert_close(y[0], whole[i], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache.state, final, rtol=1e-5, atol=1e-5)


def test_steps_continue_a_prefill():
    torch.manual_seed(0)
    inputs = step_inputs(20, torch.float32)
    whole = reference.ssd_scan(ScanInputs(*inputs, LIMIT), documents(20), 8)
    cache, slots = ScanCache(torch.ones(3, 4, 16, 16, device=DEVICE)), torch.tensor([2], device=DEVICE)
    first = [x[:19] if len(x) == 20 else x for x in inputs]
    y = ssd_prefill(ScanInputs(*first, LIMIT), documents(19), 8, cache, slots)
    row = ScanInputs(*(x[19:] if len(x) == 20 else x for x in inputs), LIMIT)
    last = ssd_step(row, cache, slots, slots)
    torch.testing.assert_close(torch.cat([y, last]), whole, rtol=1e-5, atol=1e-5)
    assert (cache.state[:2] == 1).all()


def test_small_steps_keep_their_digits():
    """softplus of -9 is 1.2e-4, of which log(1 + exp) in fp32 keeps three digits.

    A GPU's exp(-15) is 2 to the power of a rounded product: off by 6e-7.
    """
    torch.manual_seed(0)
    inputs = step_inputs(2, torch.float32)
    inputs[1] = torch.tensor([[-4.0, -7.0, -9.0, -15.0]] * 2, device=DEVICE)
    inputs[6].zero_()
    slots, start = torch.tensor([1, 0], device=DEVICE), torch.zeros(2, 4, 16, 16, device=DEVICE)
    ours, exact = ScanCache(start.clone()), ScanCache(start.double())
    ssd_step(ScanInputs(*inputs), ours, slots, slots)
    reference.ssd_step(ScanInputs(*(x.double() for x in inputs)), exact, slots, slots)
    for head in range(4):
        assert relative_error(ours.state[:, head], exact.state[:, head]) < 2e-6


def test_what_is_not_covered_is_refused():
    inputs, slots = ScanInputs(*step_inputs(1, torch.float32)), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(Uncovered, match="needs float32"):
        ssd_step(inputs, ScanCache(torch.zeros(1, 4, 16, 16, dtype=torch.bfloat16)), slots, slots)
    with pytest.raises(Uncovered, match="needs a contiguous one"):
        ssd_step(inputs, ScanCache(torch.zeros(1, 4, 16, 16).transpose(2, 3)), slots, slots)
