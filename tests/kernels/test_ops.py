"""Norms, activations, rotary embedding, convolution and attention against straightforward torch and transformers."""

import pytest
import torch
import torch.nn.functional as F
from tiny.accuracy import assert_as_exact_as, documents, randn, value_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRMSNormGated
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNormGated, causal_conv1d_fn

from prism_kernels import reference
from prism_mcore.megatron_patches import ParallelLinear

DTYPES = [torch.float32, torch.bfloat16]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def plain_rms_norm(x, weight):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def plain_gated_rms_norm(groups):
    def run(y, z, weight):
        acc = torch.promote_types(y.dtype, torch.float32)
        gated = (y.to(acc) * F.silu(z.to(acc))).unflatten(-1, (groups, -1))
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + 1e-5)
        return (weight * normed.flatten(-2)).to(y.dtype)

    return run


def plain_conv(boundaries, silu=True):
    def run(x, weight, bias):
        acc = torch.promote_types(x.dtype, torch.float32)
        rows = []
        for _, start, end in boundaries.documents:
            rows += [F.conv1d(F.pad(x[start:end].t().to(acc), (3, 0)), weight[:, None].to(acc), bias.to(acc), groups=7)]
        y = torch.cat(rows, 1).t()
        return (F.silu(y) if silu else y).to(x.dtype)

    return run


def plain_attention(boundaries, window=None):
    """Scores of the whole batch in the inputs' dtype, masked to documents; softmax in fp32."""

    def run(q, k, v):
        acc = torch.promote_types(q.dtype, torch.float32)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        i = torch.arange(len(q))
        document = torch.bucketize(i, boundaries.cu_seqlens[1:], right=True)
        seen = (document[:, None] == document) & (i[:, None] >= i)
        if window:
            seen &= i[:, None] - i < window
        scores = (torch.einsum("ihp,jhp->hij", q, k).to(acc) * 0.3).masked_fill(~seen, -torch.inf)
        return torch.einsum("hij,jhp->ihp", scores.softmax(-1).to(q.dtype), v)

    return run


@both_dtypes
def test_rms_norm(dtype):
    torch.manual_seed(0)
    inputs = [randn(5, 3, 33, dtype=dtype), randn(33, dtype=dtype)]
    assert_as_exact_as(lambda x, w: reference.rms_norm(x, w, 1e-5), plain_rms_norm, inputs)
    norm = LlamaRMSNorm(33, 1e-5).to(dtype)
    norm.weight.data = inputs[1]
    torch.testing.assert_close(reference.rms_norm(*inputs, 1e-5), norm(inputs[0]))


@both_dtypes
@pytest.mark.parametrize("groups", [1, 3])
def test_gated_rms_norm(dtype, groups):
    torch.manual_seed(0)
    inputs = [randn(7, 24, dtype=dtype), randn(7, 24, dtype=dtype), randn(24, dtype=dtype)]
    ours = reference.gated_rms_norm
    assert_as_exact_as(lambda *a: ours(*a, 1e-5, groups), plain_gated_rms_norm(groups), inputs)


def test_gated_rms_norm_equals_transformers():
    y, z, weight = randn(7, 24).float(), randn(7, 24).float(), randn(24).float()
    for norm, groups in ((NemotronHRMSNormGated(24, 8, 1e-5), 3), (GraniteMoeHybridRMSNormGated(24, 24, 1e-5), 1)):
        norm.weight.data = weight
        torch.testing.assert_close(reference.gated_rms_norm(y, z, weight, 1e-5, groups), norm(y, z))


@both_dtypes
def test_activations(dtype):
    torch.manual_seed(0)
    x = [randn(9, 26, dtype=dtype)]
    assert_as_exact_as(reference.swiglu, lambda x: F.silu(x[:, :13]) * x[:, 13:], x)
    assert_as_exact_as(reference.squared_relu, lambda x: F.relu(x).square(), x)


def test_linear_through_onednn_is_as_exact_as_torch():
    torch.manual_seed(0)  # large enough for oneDNN, odd sizes
    inputs = [randn(130, 257, dtype=torch.float32), randn(101, 257, dtype=torch.float32)]
    no_parallelism = (None, None, False, False, None, None, None)
    assert_as_exact_as(lambda x, weight: ParallelLinear.apply(x, weight, *no_parallelism), F.linear, inputs)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["plain", "llama3"])
def test_rope_equals_transformers(scaling):
    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters=scaling or {"rope_type": "default", "rope_theta": 500000.0},
    )
    frequencies = reference.rope_frequencies(128, 500000.0, scaling)
    if scaling:
        assert torch.equal(frequencies, ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0])
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1], [100, 4095, 8192, 99999, 5, 6]])
    q, k = randn(12, 4, 128).float(), randn(12, 2, 128).float()
    cos, sin = LlamaRotaryEmbedding(config)(q, position_ids)
    rows = (x.unflatten(0, (2, 6)).transpose(1, 2) for x in (q, k))
    exact = [x.transpose(1, 2).flatten(0, 1) for x in apply_rotary_pos_emb(*rows, cos, sin)]
    ours = reference.apply_rope(q, k, *reference.rope_table(position_ids, 128, 500000.0, scaling))
    torch.testing.assert_close(ours, tuple(exact), rtol=1e-6, atol=1e-6)


def test_rope_gradient_rotates_back():
    table = reference.rope_table(torch.arange(5), 6, 100.0)
    q, k = randn(5, 4, 6).requires_grad_(), randn(5, 2, 6).requires_grad_()
    rotated = reference.apply_rope(q, k, *table)
    grads = torch.autograd.grad(rotated, (q, k), [x.detach() for x in rotated])
    torch.testing.assert_close(grads, (q, k), rtol=1e-6, atol=1e-6)  # fp32 tables


class CopiesFromTheCPU(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if args and isinstance(args[0], torch.Tensor) and args[0].device.type == "cpu" and out.device.type != "cpu":
            self.names.append(func.overloadpacket.__name__)
        return out


def test_rope_copies_nothing_to_the_device_but_once():
    """A CUDA graph is captured on the second call."""
    positions = torch.arange(6, device="meta")
    for expected in (1, 0):
        with CopiesFromTheCPU() as copies, torch.inference_mode():
            reference.rope_table(positions, 16, 1234.0, LLAMA3)
        assert len(copies.names) == expected
    assert not reference.rope_table(positions, 16, 1234.0, LLAMA3)[0].is_inference()


def test_unknown_rope_scaling_is_refused():
    with pytest.raises(ValueError, match="'yarn' is not supported"):
        reference.rope_frequencies(64, 10000.0, {"rope_type": "yarn"})


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


@both_dtypes
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@all_lengths
def test_attention(lengths, window, dtype):
    torch.manual_seed(0)
    boundaries = documents(*lengths)
    inputs = [randn(sum(lengths), heads, 8, dtype=dtype) for heads in (4, 2, 2)]
    ours = reference.attention
    assert_as_exact_as(lambda *a: ours(*a, boundaries, 0.3, window), plain_attention(boundaries, window), inputs)


@both_dtypes
@pytest.mark.parametrize("window", [None, 70])
def test_attention_over_several_query_blocks(window, dtype):
    torch.manual_seed(0)
    boundaries = documents(200, 3, 65)
    inputs = [randn(268, heads, 8, dtype=dtype) for heads in (6, 2, 2)]
    ours = reference.attention
    assert_as_exact_as(lambda *a: ours(*a, boundaries, 0.3, window), plain_attention(boundaries, window), inputs)


def test_attention_on_a_gpu_takes_sdpa_with_the_same_result():
    torch.manual_seed(0)
    from prism_kernels.reference_attention import _BlockAttention, _sdpa

    q, k, v = (randn(2, 70, heads, 8, dtype=torch.float32) for heads in (4, 2, 2))
    for window in (None, 5):
        ours = _BlockAttention.apply(q, k, v, 0.3, window)
        torch.testing.assert_close(ours, _sdpa(q, k, v, 0.3, window), rtol=1e-5, atol=1e-5)


def test_attention_of_packed_documents_equals_each_alone():
    torch.manual_seed(0)
    q, k, v = (randn(100, heads, 8, dtype=torch.float32) for heads in (4, 2, 2))
    packed = value_and_gradients(lambda *a: reference.attention(*a, documents(70, 30), 0.3), [q, k, v], q)
    for start, end in ((0, 70), (70, 100)):
        cut = [x[start:end] for x in (q, k, v)]
        boundaries = documents(end - start)
        alone = value_and_gradients(lambda *a, b=boundaries: reference.attention(*a, b, 0.3), cut, cut[0])
        for a, b in zip(alone, packed, strict=True):
            assert torch.equal(a, b[start:end])


def test_head_counts_that_do_not_divide_are_named():
    q, k = randn(4, 3, 8), randn(4, 2, 8)
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 key heads"):
        reference.attention(q, k, k, documents(4), 0.3)
