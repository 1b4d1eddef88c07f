"""Attention whose result for a query has the same bits in training and in decoding.

A document's keys come in blocks of 64. Scores are dot products over head_dim, whatever the other keys; the highest of
all a query sees is exact in any order; weights are summed and multiplied with the values block by block, and the blocks
added in order. A block that a query does not see adds zeros, so it makes no difference which blocks are in the batch.
"""

# t packed tokens, n documents of one number of blocks, s their padded length, h query heads, hk key heads, m = h / hk,
# p head_dim, b rows of a decode step, L blocks

import math
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from prism_kernels.attention import reference
from prism_kernels.attention.pairs import pairs_of
from prism_kernels.attention.reference import BLOCK_ELEMENTS
from prism_kernels.boundaries import Boundaries
from prism_kernels.caches import PagedCache
from prism_kernels.linear.exact import BATCHED_ROWS, bmm
from prism_kernels.precision import LOG2_E, accumulate_dtype

BLOCK = 64  # keys added at a time, and queries worked on at a time


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: Boundaries,
    scale: float,
    window: int | None = None,
    keys: Boundaries | None = None,
) -> Tensor:
    """`reference.attention`: q [t, h, p], k and v [t, hk, p] -> [t, h, p]; products in the inputs' dtype, sums fp32."""
    if keys is not None:
        raise ValueError("exact attention has all keys of a document on its rank: use parallel.cp=1")
    boundaries.check(q=q, k=k, v=v)
    slot, shapes = boundaries.derive(_padded)
    sizes = [n * s for n, s in shapes]
    padded = (_Pad.apply(x, slot, sum(sizes)).split(sizes) for x in (q, k, v))
    parts = [
        _Attention.apply(*(x.unflatten(0, shape) for x in qkv), scale, window).flatten(0, 1)
        for qkv, shape in zip(zip(*padded, strict=True), shapes, strict=True)
    ]
    return _Unpad.apply(parts[0] if len(parts) == 1 else torch.cat(parts), slot)


def _padded(boundaries: Boundaries) -> tuple[Tensor, list[tuple[int, int]]]:
    """Each document padded to whole blocks, those of one size side by side: each token's place [t], and the sizes."""
    documents = sorted(boundaries.documents, key=lambda document: _blocks_of(document[2] - document[1]))
    slot = torch.empty(boundaries.num_tokens, dtype=torch.int64)
    shapes, at = [], 0
    for blocks, same in groupby(documents, key=lambda document: _blocks_of(document[2] - document[1])):
        first = at
        for _, start, end in same:
            slot[start:end] = torch.arange(at, at + end - start)
            at += blocks * BLOCK
        shapes.append(((at - first) // (blocks * BLOCK), blocks * BLOCK))
    return slot.to(boundaries.cu_seqlens.device), shapes


def _blocks_of(length: int) -> int:
    return -(-length // BLOCK)


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slot, size):
        ctx.slot = slot
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, slot, x)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.slot), None, None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slot):
        ctx.slot, ctx.size = slot, len(x)
        return x.index_select(0, slot)

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, ctx.slot, grad), None


class _Attention(reference._BlockAttention):
    """q [n, s, h, p], k and v [n, s, hk, p] -> [n, s, h, p], s a multiple of 64."""

    @staticmethod
    def forward(ctx, q, k, v, scale, window):
        acc, group, heads = accumulate_dtype(q.dtype), q.shape[2] // k.shape[2], k.shape[2]
        queries, keys, values = (reference._rows(x, heads) for x in (q, k, v))
        out = torch.empty_like(queries)
        lse = torch.empty(queries.shape[:2], dtype=acc)  # base 2, as the backward pass wants it
        size = max(1, BLOCK_ELEMENTS // (BLOCK * group * q.shape[1]))
        for start in range(0, q.shape[1], BLOCK):
            end = start + BLOCK
            first = 0 if window is None else max(0, start - window + 1) // BLOCK * BLOCK
            hidden = reference._hidden(start, end, start if window is None else first, window, q.device)
            rows, cols = slice(start * group, end * group), slice(first, end)
            for i in range(0, len(keys), size):
                batch = slice(i, i + size)
                scores = _scores(queries[batch, rows], keys[batch, cols], hidden)
                highest = scores.amax(-1, keepdim=True)
                weights = scores.sub_(highest).mul_(scale).exp_().unflatten(-1, (-1, BLOCK)).transpose(1, 2)
                blocks = values[batch, cols].unflatten(1, (-1, BLOCK))
                sums = _in_order(weights.sum(-1, keepdim=True))
                total = _in_order(_products(weights.to(q.dtype), blocks))
                out[batch, rows] = total.div_(sums).to(q.dtype)
                lse[batch, rows] = highest.mul_(scale * LOG2_E).add_(sums.log2_())[..., 0]
        out, lse = reference._tokens(out, q), reference._tokens(lse[..., None], q[..., :1])[..., 0]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.window = scale, window
        return out


def _scores(queries: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
    """[b, rows, keys] unscaled in the accumulation dtype, -inf where the last keys are hidden."""
    scores = bmm(queries, keys.transpose(1, 2)).to(accumulate_dtype(queries.dtype))
    last = scores[..., scores.shape[-1] - hidden.shape[1] :]
    last.unflatten(1, (len(hidden), -1)).masked_fill_(hidden[:, None], -math.inf)
    return scores


def _products(weights: Tensor, values: Tensor) -> Tensor:
    """[b, L, rows, 64] x [b, L, 64, p] -> [b, L, rows, p]."""
    b, blocks = values.shape[:2]
    return bmm(weights.flatten(0, 1), values.flatten(0, 1)).unflatten(0, (b, blocks))


def _in_order(parts: Tensor) -> Tensor:
    """[b, L, ...] -> the sum over L from the first to the last, in the accumulation dtype."""
    total = parts[:, 0].to(accumulate_dtype(parts.dtype), copy=True)
    for j in range(1, parts.shape[1]):
        total += parts[:, j]
    return total


def attention_decode(
    q: Tensor, cache: PagedCache, block_table: Tensor, lengths: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """`reference.attention_decode`: q [b, h, p] -> [b, h, p], block by block as in training."""
    if cache.block_len != BLOCK:
        raise ValueError(f"attention_decode: blocks of {cache.block_len} tokens; exact mode needs {BLOCK}")
    acc, (b, heads, p), key_heads = accumulate_dtype(q.dtype), q.shape, cache.keys.shape[2]
    group = heads // key_heads
    pairs = pairs_of(block_table, lengths, BLOCK, window)
    keys, values = (x.transpose(1, 2) for x in (cache.keys, cache.values))  # [blocks, hk, 64, p]
    queries = F.pad(q.view(b, key_heads, group, p), (0, 0, 0, -group % BATCHED_ROWS))
    scores = pairs.product(queries[pairs.rows], keys.transpose(2, 3))[:, :, :group]
    scores = scores.flatten(1, 2).to(acc).add_(pairs.hidden)  # [pairs, h, 64]
    rows = pairs.rows[:, None].expand(-1, heads)
    highest = scores.new_full((b, heads), -math.inf).scatter_reduce_(0, rows, scores.amax(-1), "amax")
    weights = scores.sub_(highest[pairs.rows, :, None]).mul_(scale).exp_()
    order, ordered_rows = pairs.in_order
    sums = weights.new_zeros(b, heads).index_add_(0, ordered_rows, weights.sum(-1)[order])
    grouped = weights.to(q.dtype).unflatten(1, (key_heads, group))
    parts = pairs.product(F.pad(grouped, (0, 0, 0, -group % BATCHED_ROWS)), values)[:, :, :group].flatten(1)
    total = sums.new_zeros(b, heads * p).index_add_(0, ordered_rows, parts[order].to(acc))
    return total.view(q.shape).div_(sums[..., None]).to(q.dtype)
