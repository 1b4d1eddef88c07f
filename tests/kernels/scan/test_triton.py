"""The scan's Triton kernels against the recurrence in fp64 and the reference in the same dtype, every gradient."""

import math

import pytest
import torch
from tiny.accuracy import DEVICE, randn, relative_error, value_and_gradients
from tiny.accuracy import kernel_documents as documents

from prism_kernels.backends import Uncovered, function
from prism_kernels.boundaries import Boundaries
from prism_kernels.scan import reference, triton
from prism_kernels.scan.inputs import ScanInputs

LIMIT = (0.05, 1.5)
NAMES = ("result", "x", "dt", "A_log", "B", "C", "D", "dt_bias", "initial state")


def scan_inputs(tokens, dtype, heads=2, groups=1, head_dim=16, state=16):
    """x, dt, A_log, B, C, D, dt_bias, cut from one buffer as the model's are: rows apart, columns together."""
    sizes = [heads * head_dim, groups * state, groups * state]
    x, B, C = randn(tokens, sum(sizes), dtype=dtype).split(sizes, -1)
    dt = randn(tokens, heads + 8, dtype=dtype)[:, 8:]
    A_log, D, dt_bias = (randn(heads, dtype=torch.float32) for _ in range(3))
    B, C = (y.unflatten(1, (groups, state)) for y in (B, C))
    inputs = [x.unflatten(1, (heads, head_dim)), dt, A_log, B, C, D, dt_bias]
    return [y.to(DEVICE) for y in inputs]


def result_and_finals(scan, boundaries, chunk_len, with_initial):
    """A function of the inputs (the last of them the initial state) whose result holds y and the final states."""

    def run(*inputs):
        initial = inputs[7] if with_initial else None
        y, final = scan(ScanInputs(*inputs[:7], LIMIT), boundaries, chunk_len, initial, True)
        return torch.cat([y.flatten().to(final.dtype), final.flatten()])

    return run


def assert_as_exact_as_reference(inputs, boundaries: Boundaries, chunk_len: int):
    """Result and gradients err against fp64 at most twice as much as the reference in bf16, five times in fp32.

    In fp32 the reference is better than plain torch: it sums pairs once for queries and keys, with fp64 decays.
    """
    factor, roundings = (2, 1) if inputs[0].dtype == torch.bfloat16 else (5, 10)
    with_initial = len(inputs) == 8
    _, heads, head_dim = inputs[0].shape
    size = inputs[0].numel() + boundaries.num_documents * heads * head_dim * inputs[3].shape[2]
    upstream = randn(size).to(DEVICE)
    kernel, plain = (
        value_and_gradients(result_and_finals(scan, boundaries, chunk_len, with_initial), inputs, upstream)
        for scan in (triton.ssd_scan, reference.ssd_scan)
    )
    wide = [x.double() for x in inputs]
    exact = value_and_gradients(result_and_finals(reference.ssd_scan, boundaries, 64, with_initial), wide, upstream)
    for name, a, b, c in zip(NAMES, kernel, plain, exact, strict=False):
        assert a.shape == c.shape
        error, allowed = ((y.double() - c).norm() for y in (a, b))
        # A sum of few elements may happen to be exact in one of the two.
        least = roundings * torch.finfo(inputs[0].dtype).eps * c.norm()
        assert error <= factor * allowed + least, f"{name}: error {error:.2e}, reference {allowed:.2e}, {c.norm():.2e}"


LAYOUTS = {
    "one token": [1],
    "one chunk": [16],
    "equal, multiple of the chunk": [32, 32],
    "ragged, empty documents": [5, 0, 35, 1, 0],
    "cuts at and between chunks": [16, 7, 33],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_result_and_every_gradient(lengths, dtype):
    torch.manual_seed(0)
    inputs = [*scan_inputs(sum(lengths), dtype), randn(len(lengths), 2, 16, 16, dtype=torch.float32).to(DEVICE)]
    assert_as_exact_as_reference(inputs, documents(*lengths), 16)


def test_segments_of_a_document_carry_states_to_each_other(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(triton, "WALKS", 16)
    inputs = [*scan_inputs(93, torch.bfloat16), randn(2, 2, 16, 16, dtype=torch.float32).to(DEVICE)]
    boundaries = documents(70, 23)
    assert_as_exact_as_reference(inputs, boundaries, 16)
    assert any(tables.carries for tables in boundaries._scan_tables.values())


@pytest.mark.parametrize(("heads", "groups"), [(3, 1), (6, 2), (2, 2)])
def test_heads_and_groups(heads, groups):
    torch.manual_seed(0)
    assert_as_exact_as_reference(scan_inputs(23, torch.bfloat16, heads, groups), documents(23), 16)


def test_widths_that_are_no_power_of_two():
    torch.manual_seed(0)
    inputs = scan_inputs(20, torch.bfloat16, head_dim=24, state=40)
    assert_as_exact_as_reference([*inputs, randn(1, 2, 24, 40, dtype=torch.float32).to(DEVICE)], documents(20), 11)


def test_heads_wider_than_64_take_shorter_chunks():
    torch.manual_seed(0)
    assert_as_exact_as_reference(scan_inputs(80, torch.bfloat16, head_dim=80), documents(80), 128)


def test_a_chunk_of_128_with_states_of_128():
    torch.manual_seed(0)
    inputs = scan_inputs(150, torch.bfloat16, head_dim=64, state=128)
    assert_as_exact_as_reference(inputs, documents(131, 19), 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strong_decays_lose_no_digits(dtype):
    """Steps up to 1.5 with A = -20: log decays of hundreds within a chunk, whose differences are what counts."""
    torch.manual_seed(0)
    inputs = scan_inputs(64, dtype)
    inputs[2].fill_(3.0)
    inputs[6].fill_(1.0)
    assert_as_exact_as_reference(inputs, documents(64), 32)


def test_a_step_of_zero_is_finite():
    inputs = scan_inputs(20, torch.float32)
    inputs[1] = torch.full_like(inputs[1], -300.0)  # softplus underflows to 0

    def run(*inputs):
        return triton.ssd_scan(ScanInputs(*inputs), documents(20), 16)

    for x in value_and_gradients(run, inputs, torch.ones(20, 2, 16, device=DEVICE)):
        assert x.isfinite().all()


def test_gradient_of_the_final_states_alone():
    torch.manual_seed(0)
    inputs = scan_inputs(20, torch.float32)

    def grads(scan, inputs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        _, final = scan(ScanInputs(*leaves), documents(13, 7), 16, return_final_states=True)
        return torch.autograd.grad(final.square().sum(), [leaves[i] for i in (0, 1, 2, 3, 6)])

    exact = grads(reference.ssd_scan, [x.double() for x in inputs])
    for a, b in zip(grads(triton.ssd_scan, inputs), exact, strict=True):
        assert relative_error(a, b) < 1e-5


def test_packed_documents_equal_separate_ones_exactly():
    torch.manual_seed(0)
    inputs = scan_inputs(40, torch.bfloat16)
    packed = triton.ssd_scan(ScanInputs(*inputs), documents(21, 19), 16)
    for start, end in ((0, 21), (21, 40)):
        cut = [x[start:end] if len(x) == 40 else x for x in inputs]
        assert torch.equal(triton.ssd_scan(ScanInputs(*cut), documents(end - start), 16), packed[start:end])


def test_gradients_are_the_same_every_time():
    torch.manual_seed(0)
    inputs, upstream = scan_inputs(40, torch.bfloat16), randn(40, 2, 16).to(DEVICE)

    def run(*inputs):
        return triton.ssd_scan(ScanInputs(*inputs), documents(21, 19), 16)

    first, second = (value_and_gradients(run, inputs, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_not_covered_goes_to_the_reference(caplog):
    inputs = scan_inputs(6, torch.float32)
    with pytest.raises(Uncovered, match="state 160: needs at most 128"):
        triton.ssd_scan(ScanInputs(*scan_inputs(6, torch.float32, state=160)), documents(6), 16)
    with pytest.raises(Uncovered, match="needs all bfloat16 or all float32"):
        triton.ssd_scan(ScanInputs(*[x.double() for x in inputs]), documents(6), 16)
    y = function("ssd_scan", "triton")(ScanInputs(*[x.double() for x in inputs]), documents(6), 16)
    assert y.dtype == torch.float64 and "plain torch is used instead" in caplog.text


def test_disagreeing_shapes_are_named():
    inputs = scan_inputs(6, torch.float32)
    with pytest.raises(ValueError, match="x has 6 tokens, cu_seqlens ends at 5"):
        triton.ssd_scan(ScanInputs(*inputs), documents(5), 16)
    with pytest.raises(ValueError, match="2 heads are not a multiple of 3 groups"):
        triton.ssd_scan(ScanInputs(*scan_inputs(6, torch.float32, groups=3)), documents(6), 16)


def test_tables_of_chunks_segments_and_documents():
    tables = documents(5, 0, 2).scan_tables(2, 2, torch.device("cpu"))
    assert tables.chunks.tolist() == [[0, 2, 0, 0, 1], [2, 2, 0, 0, 1], [4, 1, 1, 1, 0], [5, 2, 2, 0, 0]]
    assert tables.segments.tolist() == [[0, 2, 0, 4, 0, 1, 0], [2, 1, 4, 5, 0, 0, 1], [3, 1, 5, 7, 2, 1, 1]]
    assert tables.documents.tolist() == [[0, 0, 2], [2, 2, 3]]
    assert tables.carries and not documents(5).scan_tables(2, 3, torch.device("cpu")).carries


def test_limits_of_infinity_are_none():
    torch.manual_seed(0)
    inputs = scan_inputs(20, torch.float32)
    ours, plain = (
        scan(ScanInputs(*inputs, (0.0, math.inf)), documents(20), 16) for scan in (triton.ssd_scan, reference.ssd_scan)
    )
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
