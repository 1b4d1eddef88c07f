"""The chunked scan against the recurrence, transformers and itself cut into pieces."""

import math

import pytest
import torch
from tiny.accuracy import assert_as_exact_as, documents, randn, value_and_gradients
from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

from prism_kernels.boundaries import Boundaries
from prism_kernels.scan.inputs import ScanInputs
from prism_kernels.scan.reference import ssd_recurrence, ssd_scan

HEADS, HEAD_DIM, STATE = 4, 3, 5
LAYOUTS = {
    "one token": [1],
    "one chunk": [4],
    "equal, multiple of the chunk": [8, 8],
    "equal, not a multiple": [7, 7, 7],
    "ragged, empty documents": [5, 0, 11, 1, 0],
    "cuts at and between chunks": [4, 3, 9],
}


def scan_inputs(tokens: int, groups: int, dtype=torch.float64, heads=HEADS, head_dim=HEAD_DIM, state=STATE):
    """x, dt, A_log, B, C, D, dt_bias; the last four parameters at least fp32, as models keep them."""
    wide = torch.promote_types(dtype, torch.float32)
    x, dt = randn(tokens, heads, head_dim, dtype=dtype), randn(tokens, heads, dtype=dtype)
    B, C = (randn(tokens, groups, state, dtype=dtype, scale=state**-0.5) for _ in range(2))
    return [x, dt, randn(heads, dtype=wide), B, C, randn(heads, dtype=wide), randn(heads, dtype=wide)]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_scan_equals_the_recurrence(lengths, groups):
    torch.manual_seed(0)
    boundaries = documents(*lengths)
    inputs = [*scan_inputs(sum(lengths), groups), randn(len(lengths), HEADS, HEAD_DIM, STATE)]

    def run(scan):
        def both(*inputs):
            y, final = scan(ScanInputs(*inputs[:7]), boundaries, initial_state=inputs[7])
            return torch.cat([y.flatten(), final.flatten()])

        return both

    def chunked(inputs, boundaries, initial_state):
        return ssd_scan(inputs, boundaries, 4, initial_state, return_final_states=True)

    upstream = randn(sum(lengths) * HEADS * HEAD_DIM + inputs[7].numel())
    ours = value_and_gradients(run(chunked), inputs, upstream)
    exact = value_and_gradients(run(ssd_recurrence), inputs, upstream)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_gradients_of_the_scan_are_derivatives():
    torch.manual_seed(0)
    boundaries = documents(5, 3)
    inputs = [x.requires_grad_() for x in (*scan_inputs(8, 1, heads=2, head_dim=2, state=2), randn(2, 2, 2, 2))]

    def run(*inputs):
        return ssd_scan(ScanInputs(*inputs[:7], (0.01, 1.5)), boundaries, 3, inputs[7], return_final_states=True)

    assert torch.autograd.gradcheck(run, inputs)


def test_packed_documents_equal_separate_ones():
    torch.manual_seed(0)
    inputs = scan_inputs(24, 2, torch.float32)
    packed = ssd_scan(ScanInputs(*inputs), documents(10, 1, 13), 4)
    for start, end in ((0, 10), (10, 11), (11, 24)):
        cut = [x[start:end] if len(x) == 24 else x for x in inputs]
        alone = ssd_scan(ScanInputs(*cut), documents(end - start), 4)
        torch.testing.assert_close(alone, packed[start:end], rtol=1e-6, atol=1e-6)


def test_two_halves_chained_by_their_state_equal_the_whole():
    torch.manual_seed(0)
    inputs = scan_inputs(21, 1)
    whole, final = ssd_scan(ScanInputs(*inputs), documents(21), 4, return_final_states=True)
    parts, state = [], None
    for start, end in ((0, 9), (9, 21)):
        cut = [x[start:end] if len(x) == 21 else x for x in inputs]
        y, state = ssd_scan(ScanInputs(*cut), documents(end - start), 4, state, return_final_states=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts), whole)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("groups", [1, 2])
def test_scan_equals_transformers(groups):
    torch.manual_seed(0)
    x, dt, A_log, B, C, D, dt_bias = scan_inputs(38, groups, torch.float32)

    def peer(x, dt, A_log, B, C, D, dt_bias):
        x, dt, B, C = (y.unflatten(0, (2, 19)) for y in (x, dt, B, C))
        A, limit = -A_log.exp(), (0.1, math.inf)
        y = mamba2_chunk_scan(x, dt, A, B, C, 8, D=D, dt_bias=dt_bias, dt_softplus=True, dt_limit=limit)
        return y.flatten(0, 1)

    def ours(*inputs):
        return ssd_scan(ScanInputs(*inputs, (0.1, math.inf)), documents(19, 19), 8)

    inputs, upstream = [x, dt, A_log, B, C, D, dt_bias], randn(*x.shape, dtype=torch.float32)
    pairs = zip(value_and_gradients(ours, inputs, upstream), value_and_gradients(peer, inputs, upstream), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def plain_scan(boundaries: Boundaries):
    """The quadratic form of the whole batch, in the inputs' dtype except for the decays: what one would write."""

    def run(x, dt, A_log, B, C, D, dt_bias):
        acc = torch.promote_types(x.dtype, torch.float32)
        step = torch.nn.functional.softplus(dt.to(acc) + dt_bias)
        log = (step * -A_log.exp()).cumsum(0)
        gap = log[:, None] - log[None]
        which = torch.bucketize(torch.arange(len(x)), boundaries.cu_seqlens[1:], right=True)
        seen = (which[:, None] == which[None]).tril()
        decay = gap.masked_fill(~seen[..., None], -math.inf).exp()
        B, C = (y.repeat_interleave(x.shape[1] // y.shape[1], 1) for y in (B, C))
        scores = torch.einsum("ihn,jhn->ijh", C, B) * decay
        y = torch.einsum("ijh,jhp->ihp", scores.to(x.dtype), (x * step[..., None]).to(x.dtype))
        return (y + x * D[:, None]).to(x.dtype)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [-3.0, 1.0], ids=["slow decay", "fast decay"])
def test_scan_is_as_exact_as_plain_torch(dtype, decay):
    torch.manual_seed(0)
    boundaries = documents(150, 64, 41)
    inputs = scan_inputs(255, 2, dtype, head_dim=32, state=16)
    inputs[2], inputs[6] = inputs[2].abs(), torch.full_like(inputs[6], decay)
    assert_as_exact_as(lambda *a: ssd_scan(ScanInputs(*a), boundaries, 64), plain_scan(boundaries), inputs)


def test_a_step_of_zero_has_finite_gradients():
    inputs = scan_inputs(6, 1, torch.float32)
    inputs[1] = torch.full_like(inputs[1], -200.0)  # softplus underflows to 0

    def run(*inputs):
        return ssd_scan(ScanInputs(*inputs), documents(6), 4)

    for x in value_and_gradients(run, inputs, torch.ones(6, HEADS, HEAD_DIM)):
        assert x.isfinite().all()


def test_disagreeing_shapes_are_named():
    inputs = scan_inputs(6, 1)
    with pytest.raises(ValueError, match="x has 6 tokens, cu_seqlens ends at 5"):
        ssd_scan(ScanInputs(*inputs), documents(5), 4)
    inputs[3] = randn(6, 3, STATE)
    with pytest.raises(ValueError, match="4 heads are not a multiple of 3 groups"):
        ssd_scan(ScanInputs(*inputs), documents(6), 4)
