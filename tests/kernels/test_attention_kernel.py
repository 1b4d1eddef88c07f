"""Triton's attention, packed and decoding, against plain torch in the same dtype and fp64: values and every gradient."""

# t packed tokens, h query heads, hk key heads, p head_dim

import pytest
import torch
from accuracy import DEVICE, assert_as_exact_as, documents, randn

from prism_kernels.attention import attention
from prism_kernels.backends import Uncovered

LENGTHS = [200, 0, 1, 33]  # blocks are 128 tokens, met by blocks of 64 or 128


def qkv(tokens, heads, key_heads, p=32, dtype=torch.bfloat16):
    return [randn(tokens, n, p, dtype=dtype).to(DEVICE) for n in (heads, key_heads, key_heads)]


def plain_attention(boundaries, window=None, scale=0.3):
    """Scores of the whole batch in the inputs' dtype, masked to documents; softmax in fp32."""

    def run(q, k, v):
        acc = torch.promote_types(q.dtype, torch.float32)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        i = torch.arange(len(q), device=q.device)
        document = torch.bucketize(i, boundaries.cu_seqlens[1:].to(q.device), right=True)
        seen = (document[:, None] == document) & (i[:, None] >= i)
        if window:
            seen &= i[:, None] - i < window
        scores = (torch.einsum("ihp,jhp->hij", q, k).to(acc) * scale).masked_fill(~seen, -torch.inf)
        return torch.einsum("hij,jhp->ihp", scores.softmax(-1).to(q.dtype), v)

    return run


@pytest.mark.parametrize("window", [None, 5, 150])  # within a block; reaching back over whole and cut blocks
def test_values_and_gradients_within_documents(window):
    torch.manual_seed(0)
    boundaries = documents(*LENGTHS)
    inputs = qkv(sum(LENGTHS), 4, 2)
    assert_as_exact_as(
        lambda q, k, v: attention(q, k, v, boundaries, 0.3, window), plain_attention(boundaries, window), inputs
    )


def test_key_blocks_no_query_is_masked_in(monkeypatch):
    torch.manual_seed(0)  # a window of 300 in 450 tokens: hidden, cut, whole and diagonal blocks
    monkeypatch.setattr("prism_kernels.attention.MULTIPROCESSORS", 1)  # one program takes all heads of a group
    boundaries, inputs = documents(450), qkv(450, 2, 1, 16)
    assert_as_exact_as(
        lambda q, k, v: attention(q, k, v, boundaries, 0.3, 300), plain_attention(boundaries, 300), inputs
    )


@pytest.mark.parametrize(("heads", "p"), [(5, 64), (1, 128)])
def test_head_dims_and_groups(heads, p):
    torch.manual_seed(0)
    boundaries = documents(20, 40)
    inputs = qkv(60, heads, 1, p, torch.float16)
    assert_as_exact_as(
        lambda q, k, v: attention(q, k, v, boundaries, 0.1), plain_attention(boundaries, scale=0.1), inputs
    )


def test_slices_of_the_projection_are_read_where_they_lie():
    torch.manual_seed(0)
    buffer = randn(40, 2, 4, 32, dtype=torch.bfloat16).to(DEVICE).requires_grad_()
    upstream = randn(40, 4, 64, dtype=torch.bfloat16).to(DEVICE)[..., :32]
    boundaries, results = documents(17, 23), []
    for copy in (lambda x: x, torch.clone):
        q, k, v = (copy(x) for x in (buffer[:, :, :2].reshape(40, 4, 32), buffer[:, :, 2], buffer[:, :, 3]))
        y = attention(q, k, v, boundaries, 0.2)
        results.append((y, *torch.autograd.grad(y, buffer, upstream)))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_a_document_gets_exactly_what_it_gets_alone():
    torch.manual_seed(0)
    boundaries, inputs = documents(*LENGTHS), qkv(sum(LENGTHS), 2, 1)
    together = attention(*inputs, boundaries, 0.3)
    for _, start, end in boundaries.documents:
        alone = attention(*(x[start:end] for x in inputs), documents(end - start), 0.3)
        assert torch.equal(together[start:end], alone)


def test_what_is_not_covered_is_said():
    boundaries = documents(4)
    with pytest.raises(Uncovered, match="head_dim 80: needs one of"):
        attention(*qkv(4, 2, 1, 80), boundaries, 1.0)
    with pytest.raises(Uncovered, match="q, k, v in torch.float32"):
        attention(*qkv(4, 2, 1, 32, torch.float32), boundaries, 1.0)
    with pytest.raises(ValueError, match="window=0; needs at least 1"):
        attention(*qkv(4, 2, 1), boundaries, 1.0, 0)
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        attention(*qkv(4, 3, 2), boundaries, 1.0)
