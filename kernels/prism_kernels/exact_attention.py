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

from prism_kernels import reference_attention as reference
from prism_kernels.boundaries import Boundaries
from prism_kernels.caches import PagedCache
from prism_kernels.exact_linear import ROWS
from prism_kernels.precision import accumulate_dtype
from prism_kernels.reference_attention import BLOCK_ELEMENTS, LOG2_E

BLOCK = 64  # keys added at a time, and queries worked on at a time


def attention(
    q: Tensor, k: Tensor, v: Tensor, boundaries: Boundaries, scale: float, window: int | None = None
) -> Tensor:
    """`reference.attention`: q [t, h, p], k and v [t, hk, p] -> [t, h, p]; products in the inputs' dtype, sums fp32."""
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
                scores = reference._scores(queries[batch, rows], keys[batch, cols], hidden)
                highest = scores.amax(-1, keepdim=True)
                weights = scores.sub_(highest).mul_(scale).exp_().unflatten(-1, (-1, BLOCK)).transpose(1, 2)
                blocks = values[batch, cols].unflatten(1, (-1, BLOCK))
                sums = _in_order(weights.sum(-1, keepdim=True))
                total = _in_order(_products(weights.to(q.dtype), blocks))
                out[batch, rows] = total.div_(sums).to(q.dtype)
                lse[batch, rows] = highest.mul_(scale * LOG2_E).add_(sums.log2_())[..., 0]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.window = scale, window
        return reference._tokens(out, q)


def _products(weights: Tensor, values: Tensor) -> Tensor:
    """[b, L, rows, 64] x [b, L, 64, p] -> [b, L, rows, p]."""
    b, blocks = values.shape[:2]
    return torch.bmm(weights.flatten(0, 1), values.flatten(0, 1)).unflatten(0, (b, blocks))


def _in_order(parts: Tensor) -> Tensor:
    """[b, L, ...] -> the sum over L from the first to the last, in the accumulation dtype."""
    total = parts[:, 0].to(accumulate_dtype(parts.dtype), copy=True)
    for j in range(1, parts.shape[1]):
        total += parts[:, j]
    return total


def attention_decode(
    q: Tensor, cache: PagedCache, block_table: Tensor, lengths: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """`reference_decode.attention_decode`: q [b, h, p] -> [b, h, p]; reads the blocks that the rows have, no others."""
    if cache.block_len != BLOCK:
        raise ValueError(f"attention_decode: blocks of {cache.block_len} tokens; exact mode needs {BLOCK}")
    b, p, heads = len(q), q.shape[2], cache.keys.shape[2]
    group = q.shape[1] // heads
    queries = F.pad(q.view(b, heads, group, p), (0, 0, 0, -group % ROWS))
    count = int(-(-lengths.max() // BLOCK))
    first_token = torch.arange(count) * BLOCK
    seen = first_token < lengths[:, None]
    if window is not None:
        seen &= first_token + BLOCK > lengths[:, None] - window
    row, block = seen.nonzero(as_tuple=True)
    used = block_table[row, block].long()
    keys, values = (x.transpose(1, 2)[used].flatten(0, 1) for x in (cache.keys, cache.values))  # [pairs * hk, 64, p]

    scores = torch.bmm(queries[row].flatten(0, 1), keys.transpose(1, 2)).to(accumulate_dtype(q.dtype))
    scores = scores.unflatten(0, (-1, heads))[:, :, :group]  # [pairs, hk, m, 64]
    place = first_token[block][:, None] + torch.arange(BLOCK)
    hidden = place >= lengths[row, None]
    if window is not None:
        hidden |= place < lengths[row, None] - window
    scores = scores.masked_fill(hidden[:, None, None], -math.inf)
    highest = _spread(scores.amax(-1), row, block, (b, count), -math.inf).amax(1)
    weights = scores.sub_(highest[row, ..., None]).mul_(scale).exp_()
    sums = _in_order(_spread(weights.sum(-1), row, block, (b, count), 0))
    padded = F.pad(weights.to(q.dtype), (0, 0, 0, -group % ROWS)).flatten(0, 1)
    parts = torch.bmm(padded, values)[:, :group].unflatten(0, (-1, heads))
    total = _in_order(_spread(parts, row, block, (b, count), 0))
    return total.div_(sums[..., None]).to(q.dtype).flatten(1, 2)


def _spread(parts: Tensor, row: Tensor, block: Tensor, shape: tuple[int, int], rest: float) -> Tensor:
    """[pairs, ...] -> [b, L, ...], `rest` where a row does not have the block."""
    if len(parts) == shape[0] * shape[1]:
        return parts.view(*shape, *parts.shape[1:])
    out = parts.new_full((*shape, *parts.shape[1:]), rest)
    out[row, block] = parts
    return out
