"""Triton's attention, packed and decoding, against plain torch in its dtype and in fp64: values and every gradient."""

# t packed tokens, h query heads, hk key heads, p head_dim

import pytest
import torch
from tiny.accuracy import DEVICE, assert_as_exact_as, randn, relative_error, value_and_gradients
from tiny.accuracy import kernel_documents as documents

from prism_kernels.attention import reference
from prism_kernels.attention.triton import attention, attention_decode
from prism_kernels.backends import Uncovered
from prism_kernels.caches import PagedCache

LENGTHS = [200, 0, 1, 33]  # blocks are 128 tokens, met by blocks of 64 or 128


def qkv(tokens, heads, key_heads, p=32, dtype=torch.bfloat16):
    return [randn(tokens, n, p, dtype=dtype).to(DEVICE) for n in (heads, key_heads, key_heads)]


def attend(inputs, boundaries, scale=0.3, window=None):
    q, k, v = inputs
    return attention(q, k, v, boundaries, scale, window)


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


LAST = [(300, 40), (150, 150), (141, 1), (70, 66)]  # documents' keys, and how many of them have a query


@pytest.mark.parametrize("window", [None, 20, 150])
def test_queries_of_the_last_tokens_of_longer_documents(window):
    torch.manual_seed(0)
    keys, boundaries = (documents(*lengths) for lengths in zip(*LAST, strict=True))
    q, k, v = qkv(keys.num_tokens, 2, 1, 16)
    ends = zip(keys.offsets[1:], LAST, strict=True)
    last = torch.cat([torch.arange(end - queries, end) for end, (_, queries) in ends]).to(DEVICE)
    plain = plain_attention(keys, window)

    def of_all(q, k, v):
        whole = q.new_zeros(len(k), *q.shape[1:]).index_copy(0, last, q)
        return plain(whole, k, v)[last]

    assert_as_exact_as(lambda q, k, v: attention(q, k, v, boundaries, 0.3, window, keys), of_all, [q[last], k, v])


def test_key_blocks_no_query_is_masked_in(monkeypatch):
    torch.manual_seed(0)  # a window of 300 in 450 tokens: hidden, cut, whole and diagonal blocks
    monkeypatch.setattr("prism_kernels.attention.triton.MULTIPROCESSORS", 1)  # one program takes all heads of a group
    boundaries, inputs, upstream = documents(450), qkv(450, 2, 1, 16), randn(450, 2, 16).to(DEVICE)
    plain = plain_attention(boundaries, 300)
    ours = value_and_gradients(lambda *x: attend(x, boundaries, window=300), inputs, upstream)
    exact = value_and_gradients(plain, [x.double() for x in inputs], upstream)
    for got, expected in zip(ours, exact, strict=True):  # token by token: few see a wrong edge
        assert ((got - expected).norm(dim=(1, 2)) < 0.05 * expected.norm(dim=(1, 2)) + 0.01).all()


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
    together = attend(inputs, boundaries)
    for _, start, end in boundaries.documents:
        alone = attend([x[start:end] for x in inputs], documents(end - start))
        assert torch.equal(together[start:end], alone)


def test_what_is_not_covered_is_said():
    boundaries = documents(4)

    def run(heads=2, key_heads=1, p=32, dtype=torch.bfloat16, window=None):
        attend(qkv(4, heads, key_heads, p, dtype), boundaries, window=window)

    with pytest.raises(Uncovered, match="head_dim 80: needs one of"):
        run(p=80)
    with pytest.raises(Uncovered, match=r"q, k, v in torch.float32"):
        run(dtype=torch.float32)
    with pytest.raises(ValueError, match="window=0; needs at least 1"):
        run(window=0)
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        run(3, 2)
    with pytest.raises(ValueError, match="document 0 has 4 queries and 3 keys"):
        attention(*qkv(4, 1, 1)[:1], *qkv(3, 1, 1)[1:], boundaries, 0.3, None, documents(3))


@pytest.mark.parametrize("most_parts", [1, 64])  # a program for all of a context, and contexts cut into parts
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decoding_over_pages(monkeypatch, dtype, window, most_parts):
    torch.manual_seed(0)
    monkeypatch.setattr("prism_kernels.attention.decode.MOST_PARTS", most_parts)
    monkeypatch.setattr("prism_kernels.attention.decode.SHORTEST_PART", 30)
    lengths = torch.tensor([1, 65, 160], dtype=torch.int32, device=DEVICE)
    keys, values = (randn(40, 16, 2, 32, dtype=dtype).to(DEVICE) for _ in range(2))
    block_table = torch.randperm(40)[:30].view(3, 10).to(torch.int32).to(DEVICE)  # of 16 tokens each
    q = randn(3, 8, 48, dtype=dtype).to(DEVICE)[:, :6, :32]
    cache, wide = PagedCache(keys, values), PagedCache(keys.double(), values.double())
    ours = attention_decode(q, cache, block_table, lengths, 0.3, window)
    plain = reference.attention_decode(q, cache, block_table, lengths, 0.3, window)
    exact = reference.attention_decode(q.double(), wide, block_table, lengths, 0.3, window)
    for row in range(3):
        assert (
            relative_error(ours[row], exact[row]) <= 2 * relative_error(plain[row], exact[row]) + torch.finfo(dtype).eps
        )


def test_decoding_nothing_gives_zeros_and_other_rows_their_own():
    torch.manual_seed(0)
    cache = PagedCache(*(randn(64, 16, 1, 16, dtype=torch.bfloat16).to(DEVICE) for _ in range(2)))
    block_table = torch.arange(64, dtype=torch.int32, device=DEVICE).view(2, 32)
    lengths = torch.tensor([0, 300], dtype=torch.int32, device=DEVICE)
    q = randn(2, 3, 16, dtype=torch.bfloat16).to(DEVICE)
    both = attention_decode(q, cache, block_table, lengths, 0.3)
    assert not both[0].any()
    k, v = (x[32:].flatten(0, 1)[:300] for x in (cache.keys, cache.values))
    alone = attend([q[1:].expand(300, -1, -1), k, v], documents(300))[-1]
    assert relative_error(both[1], alone) < 2**-7


def test_a_cache_in_another_dtype_is_not_covered():
    cache = PagedCache(*(torch.zeros(1, 16, 1, 16, device=DEVICE) for _ in range(2)))
    q, table = torch.zeros(1, 1, 16, dtype=torch.bfloat16, device=DEVICE), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(Uncovered, match=r"q in torch.bfloat16, cache in torch.float32"):
        attention_decode(q, cache, table, table[0], 1.0)
