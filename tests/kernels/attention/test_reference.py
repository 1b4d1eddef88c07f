"""Attention against the whole batch's masked scores, packed and alone."""

import pytest
import torch
from tiny.accuracy import assert_as_exact_as, documents, randn, value_and_gradients

from prism_kernels.attention import reference

DTYPES = [torch.float32, torch.bfloat16]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


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


LENGTHS = {"one token": [1], "equal": [9, 9], "ragged": [2, 11, 1, 3], "empty": [0, 5, 0, 6, 0]}
all_lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())


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
@pytest.mark.parametrize("window", [None, 1, 20, 150])
def test_queries_of_the_last_tokens_of_longer_documents(window, dtype):
    torch.manual_seed(0)
    lengths, queries = [300, 30, 41, 70], [90, 30, 1, 66]
    keys, boundaries = documents(*lengths), documents(*queries)
    q, k, v = (randn(sum(lengths), heads, 8, dtype=dtype) for heads in (4, 2, 2))
    last = torch.cat([torch.arange(e - n, e) for e, n in zip(keys.offsets[1:], queries, strict=True)])
    plain = plain_attention(keys, window)

    def of_all(q, k, v):
        return plain(q.new_zeros(len(k), *q.shape[1:]).index_copy(0, last, q), k, v)[last]

    inputs = [q[last], k, v]
    for of_documents in (reference._BlockAttention.apply, reference._sdpa):
        parts = [
            of_documents(q_[None], k_[None], v_[None], 0.3, window)[0]
            for q_, k_, v_ in zip(q[last].split(queries), k.split(lengths), v.split(lengths), strict=True)
        ]
        torch.testing.assert_close(torch.cat(parts).float(), of_all(*inputs).float(), rtol=2e-2, atol=2e-2)
    assert_as_exact_as(lambda *a: reference.attention(*a, boundaries, 0.3, window, keys), of_all, inputs)


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
    from prism_kernels.attention.reference import _BlockAttention, _sdpa

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
