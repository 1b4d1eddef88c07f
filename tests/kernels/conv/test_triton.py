"""The Triton convolution against plain torch in its dtype and in fp64: values, every gradient, states, decode steps."""

# t packed tokens, c channels

import pytest
import torch
import torch.nn.functional as F
from tiny.accuracy import DEVICE, assert_as_exact_as, randn
from tiny.accuracy import kernel_documents as documents

from prism_kernels.backends import Uncovered
from prism_kernels.caches import ConvCache
from prism_kernels.conv import reference
from prism_kernels.conv.triton import causal_conv1d, conv_step

LENGTHS = [66, 0, 1, 9, 2]  # blocks are 32 tokens forward, 64 backward
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def plain_conv(boundaries, silu=True):
    """Each document by itself, its three earlier inputs in front; final states behind, flattened."""

    def run(x, weight, bias=None, initial=None):
        acc = torch.promote_types(x.dtype, torch.float32)
        rows, states = [], []
        for i, (start, end) in enumerate(zip(boundaries.offsets, boundaries.offsets[1:], strict=False)):
            before = x.new_zeros(x.shape[1], 3) if initial is None else initial[i]
            row = torch.cat([before, x[start:end].t()], 1)
            states.append(row[:, -3:])
            if end > start:
                out = F.conv1d(
                    row.to(acc), weight[:, None].to(acc), None if bias is None else bias.to(acc), groups=len(row)
                )
                rows.append((F.silu(out) if silu else out).t().to(x.dtype))
        return torch.cat([torch.cat(rows).flatten(), torch.stack(states).flatten()])

    return run


def kernel_conv(boundaries, silu=True):
    def run(x, weight, bias=None, initial=None):
        out = causal_conv1d(x, weight, bias, boundaries, silu, initial, return_final_state=True)
        return torch.cat([part.flatten() for part in out])

    return run


def weights(dtype, channels=40):
    return [randn(channels, 4, dtype=dtype).to(DEVICE), randn(channels, dtype=dtype).to(DEVICE)]


@dtypes
def test_values_and_gradients_of_documents_with_states(dtype):
    torch.manual_seed(0)
    boundaries, t = documents(*LENGTHS), sum(LENGTHS)
    initial = randn(len(LENGTHS), 40, 3, dtype=dtype).to(DEVICE)
    inputs = [randn(t, 40, dtype=dtype).to(DEVICE), *weights(dtype), initial]
    assert_as_exact_as(kernel_conv(boundaries), plain_conv(boundaries), inputs)


@pytest.mark.parametrize("silu", [True, False])
def test_without_bias_and_states(silu):
    torch.manual_seed(0)
    boundaries = documents(7, 2)  # more than one block of 256 channels forward and two of 128 backward
    inputs = [randn(9, 264, dtype=torch.bfloat16).to(DEVICE), weights(torch.bfloat16, 264)[0]]
    assert_as_exact_as(kernel_conv(boundaries, silu), plain_conv(boundaries, silu), inputs)


@pytest.mark.parametrize(("offset", "width"), [(24, 40), (3, 37)])  # aligned to 16 bytes, and not at all
def test_columns_of_a_wider_buffer_are_read_where_they_lie(offset, width):
    torch.manual_seed(0)
    boundaries = documents(9, 6)
    buffer = randn(15, width, dtype=torch.bfloat16).to(DEVICE).requires_grad_()
    x = buffer[:, offset : offset + 16]
    weight, bias = weights(torch.bfloat16, 16)
    y = causal_conv1d(x, weight, bias, boundaries)
    upstream = randn(15, 32, dtype=torch.bfloat16).to(DEVICE)[:, 8:24]
    (grad,) = torch.autograd.grad(y, buffer, upstream)
    packed = x.detach().contiguous().requires_grad_()
    expected = causal_conv1d(packed, weight, bias, boundaries)
    (expected_grad,) = torch.autograd.grad(expected, packed, upstream.contiguous())
    assert torch.equal(y, expected)
    assert torch.equal(grad[:, offset : offset + 16], expected_grad)


def test_a_document_gets_exactly_what_it_gets_alone():
    torch.manual_seed(0)
    boundaries = documents(*LENGTHS)
    x, (weight, bias) = randn(sum(LENGTHS), 16, dtype=torch.bfloat16).to(DEVICE), weights(torch.bfloat16, 16)
    together = causal_conv1d(x, weight, bias, boundaries)
    for _, start, end in boundaries.documents:
        alone = causal_conv1d(x[start:end], weight, bias, documents(end - start))
        assert torch.equal(together[start:end], alone)


def test_the_weight_gradient_of_many_programs_and_rounds(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("prism_kernels.conv.triton.BACKWARD_PROGRAMS", 3)
    monkeypatch.setattr("prism_kernels.conv.triton.BACKWARD_BLOCK", 8)  # seven blocks: each program adds up several
    boundaries = documents(35, 12)
    inputs = [randn(47, 24, dtype=torch.float32).to(DEVICE), *weights(torch.float32, 24)]
    assert_as_exact_as(kernel_conv(boundaries), plain_conv(boundaries), inputs)


@dtypes
def test_steps_continue_a_convolution(dtype):
    torch.manual_seed(0)
    (weight, bias), prompt = weights(dtype, 40), 5
    x = randn(2, 9, 40, dtype=dtype).to(DEVICE)
    whole = kernel_conv(documents(9, 9))(x.flatten(0, 1), weight, bias)[: x.numel()].view_as(x)
    _, state = causal_conv1d(
        x[:, :prompt].flatten(0, 1), weight, bias, documents(prompt, prompt), return_final_state=True
    )
    slots = torch.tensor([3, 1], device=DEVICE)
    caches = [ConvCache(randn(4, 40, 3, dtype=dtype).to(DEVICE)) for _ in range(2)]
    caches[1].state.copy_(caches[0].state)
    for cache in caches:
        cache.state[slots] = state
    for i in range(prompt, 9):
        y = conv_step(x[:, i], weight, bias, caches[0], slots)
        expected = reference.conv_step(x[:, i], weight, bias, caches[1], slots)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(y, whole[:, i])
        assert torch.equal(caches[0].state, caches[1].state)  # the other slots are as they were, too


def test_what_is_not_covered_is_said():
    boundaries, x = documents(3), torch.zeros(3, 8, device=DEVICE)
    with pytest.raises(Uncovered, match="3 taps: needs 4"):
        causal_conv1d(x, torch.zeros(8, 3, device=DEVICE), None, boundaries)
    with pytest.raises(Uncovered, match=r"x in torch.float64"):
        causal_conv1d(x.double(), torch.zeros(8, 4, device=DEVICE), None, boundaries)
