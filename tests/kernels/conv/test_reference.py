"""The convolution against straightforward torch and transformers, packed, alone and in pieces."""

import pytest
import torch
import torch.nn.functional as F
from tiny.accuracy import assert_as_exact_as, documents, randn
from transformers.models.nemotron_h.modeling_nemotron_h import causal_conv1d_fn

from prism_kernels.conv import reference

DTYPES = [torch.float32, torch.bfloat16]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def plain_conv(boundaries, silu=True):
    def run(x, weight, bias):
        acc = torch.promote_types(x.dtype, torch.float32)
        rows = []
        for _, start, end in boundaries.documents:
            rows += [F.conv1d(F.pad(x[start:end].t().to(acc), (3, 0)), weight[:, None].to(acc), bias.to(acc), groups=7)]
        y = torch.cat(rows, 1).t()
        return (F.silu(y) if silu else y).to(x.dtype)

    return run


LENGTHS = {"one token": [1], "equal": [9, 9], "ragged": [2, 11, 1, 3], "empty": [0, 5, 0, 6, 0]}
all_lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())


@both_dtypes
@pytest.mark.parametrize("silu", [True, False])
@all_lengths
def test_conv(lengths, silu, dtype):
    torch.manual_seed(0)
    boundaries = documents(*lengths)
    inputs = [randn(sum(lengths), 7, dtype=dtype), randn(7, 4, dtype=dtype), randn(7, dtype=dtype)]
    conv = reference.causal_conv1d
    assert_as_exact_as(lambda *a: conv(*a, boundaries, silu), plain_conv(boundaries, silu), inputs)


def test_conv_equals_transformers():
    x, weight, bias = randn(12, 7).float(), randn(7, 4).float(), randn(7).float()
    exact = causal_conv1d_fn(x.t()[None], weight, bias, activation="silu")[0].t()
    torch.testing.assert_close(reference.causal_conv1d(x, weight, bias, documents(12)), exact)


def test_conv_of_packed_documents_equals_each_alone():
    x, weight, bias = randn(14, 7).float(), randn(7, 4).float(), randn(7).float()
    packed = reference.causal_conv1d(x, weight, bias, documents(2, 9, 3))
    for start, end in ((0, 2), (2, 11), (11, 14)):
        alone = reference.causal_conv1d(x[start:end], weight, bias, documents(end - start))
        torch.testing.assert_close(alone, packed[start:end], rtol=1e-6, atol=1e-6)  # a vector's tail has no FMA


def test_conv_halves_chained_by_their_state_equal_the_whole():
    x, weight, bias = randn(10, 7), randn(7, 4), randn(7)
    whole, final = reference.causal_conv1d(x, weight, bias, documents(10), return_final_state=True)
    parts, state = [], torch.zeros(1, 7, 3, dtype=torch.float64)
    for start, end in ((0, 2), (2, 3), (3, 10)):
        args = (x[start:end], weight, bias, documents(end - start))
        y, state = reference.causal_conv1d(*args, initial_state=state, return_final_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts), whole)
    torch.testing.assert_close(state, final)


def test_conv_gradients_are_derivatives():
    torch.manual_seed(0)
    inputs = [x.requires_grad_() for x in (randn(6, 2), randn(2, 3), randn(2), randn(3, 2, 2))]

    def run(x, weight, bias, state):
        return reference.causal_conv1d(x, weight, bias, documents(1, 0, 5), True, state, return_final_state=True)

    assert torch.autograd.gradcheck(run, inputs)
