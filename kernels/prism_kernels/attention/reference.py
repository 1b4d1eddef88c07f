"""Causal attention within documents in plain torch, with an explicit backward in blocks of queries.

Forward without a window is torch's own CPU kernel. Its backward takes half as long again as this one in bf16, and it
knows no window: there, each block of queries meets only the keys it may see, in batched products, with all query heads
of one key head in the same product.
"""

# t packed tokens, b documents of equal length, s tokens of each, h query heads, k key heads, m = h / k, p head_dim;
# of a decode step: b rows, hk key heads, L longest context in blocks, N (row, block) pairs in use

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from prism_kernels.attention.pairs import pairs_of
from prism_kernels.boundaries import Boundaries
from prism_kernels.caches import PagedCache
from prism_kernels.precision import LOG2_E, accumulate_dtype

QUERIES = 64  # in a block
BLOCK_ELEMENTS = 2**20  # scores alive at a time


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: Boundaries,
    scale: float,
    window: int | None = None,
    keys: Boundaries | None = None,
) -> Tensor:
    """Causal attention within each document: q [t, h, p], k and v [t, hk, p] with h % hk == 0; returns [t, h, p].

    window w: query i sees keys j with i - w < j <= i, itself included (Mistral's convention). keys: where each
    document's keys are, k and v then [tk, hk, p], its queries being its last tokens; None: as its queries.
    Scores and softmax in fp32 (fp64 for fp64). On a GPU this is torch's SDPA.
    """
    boundaries.check(q=q)
    (keys or boundaries).check(k=k, v=v)
    boundaries.check_keys(keys or boundaries)
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if window is not None and window < 1:
        raise ValueError(f"attention: window={window}; needs at least 1 (the token itself), or None")
    equal = _sdpa if q.device.type != "cpu" else _BlockAttention.apply
    if keys is not None:
        spans = [(slice(start, end), slice(*keys.offsets[i : i + 2])) for i, start, end in boundaries.documents]
        return torch.cat([equal(q[None, i], k[None, j], v[None, j], scale, window)[0] for i, j in spans])
    if boundaries.uniform_len:
        shape = (len(boundaries.documents), boundaries.uniform_len)
        q, k, v = (x.unflatten(0, shape) for x in (q, k, v))
        return equal(q, k, v, scale, window).flatten(0, 1)
    documents = [slice(start, end) for _, start, end in boundaries.documents]
    return torch.cat([equal(q[None, i], k[None, i], v[None, i], scale, window)[0] for i in documents])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    (rows, length), gqa = (q.shape[1], k.shape[1]), q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if rows == length and (window is None or window >= length):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    else:
        mask = ~_hidden(length - rows, length, 0, window, q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2)


def _hidden(start: int, end: int, first_key: int, window: int | None, device: torch.device) -> Tensor:
    """[end - start, end - first_key] bool: keys from first_key on that queries start..end do not see."""
    query = torch.arange(start, end, device=device)[:, None]
    key = torch.arange(first_key, end, device=device)
    return key > query if window is None else (key > query) | (key <= query - window)


class _BlockAttention(torch.autograd.Function):
    """q [b, s, h, p], k and v [b, sk, hk, p] -> [b, s, h, p]; kept for backward: lse [b, s, h], base 2.

    Queries are the last s of the sk tokens.
    """

    @staticmethod
    def forward(ctx, q, k, v, scale, window):
        whole = q.shape[1] == k.shape[1] and (window is None or window >= k.shape[1])
        out, lse = (_flash if whole else _windowed)(q, k, v, scale, window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    def backward(ctx, grad):
        """Each block of queries is laid out once, for all of its products; they are fp32 for bf16 inputs, too: from and
        to bf16, scores and their gradients take as long to cast as to multiply.
        """
        q, k, v, out, lse = ctx.saved_tensors
        scale, dtype, heads = ctx.scale, q.dtype, k.shape[2]
        q, k, v, grad = (x.to(lse.dtype) for x in (q, k, v, grad))
        keys, values = _rows(k, heads), _rows(v, heads)
        # Weights come out times `scale`, which the gradient of the scores needs; that of the values takes it off again.
        level = lse.neg().add_(math.log2(scale))[..., None]
        delta = (grad * out).sum(-1, keepdim=True)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
        for block, cols, batches, hidden in _blocks(q, k, ctx.window):
            rows, grads, levels, means = (_rows(x[:, block], heads) for x in (q, grad, level, delta))
            grad_rows = torch.empty_like(rows)
            for batch in batches:
                key, value = keys[batch, cols], values[batch, cols]
                scores = _scores(rows[batch], key, hidden)
                weights = torch.add(levels[batch], scores, alpha=scale * LOG2_E, out=scores).exp2_()
                grad_v[batch, cols] += torch.bmm(weights.transpose(1, 2), grads[batch])
                grad_scores = torch.bmm(grads[batch], value.transpose(1, 2)).sub_(means[batch]).mul_(weights)
                torch.bmm(grad_scores, key, out=grad_rows[batch])
                grad_k[batch, cols] += torch.bmm(grad_scores.transpose(1, 2), rows[batch])
            grad_q[:, block] = _tokens(grad_rows, grad_q[:, block])
        grad_k, grad_v = _tokens(grad_k, k), _tokens(grad_v.div_(scale), v)
        return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype), None, None


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """(out, lse) by torch's own kernel, which skips the keys above the diagonal and multiplies bf16 as such."""
    group = q.shape[2] // k.shape[2]
    k, v = (x if group == 1 else x.repeat_interleave(group, 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True, scale=scale)
    return out.transpose(1, 2), lse.transpose(1, 2) * LOG2_E


def _windowed(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """(out, lse), visiting only the keys that a block of queries sees."""
    dtype, heads = q.dtype, k.shape[2]
    q, k, v = (x.to(accumulate_dtype(dtype)) for x in (q, k, v))
    keys, values = _rows(k, heads), _rows(v, heads)
    out, lse = torch.empty(q.shape, dtype=dtype), torch.empty(q.shape[:3], dtype=q.dtype)
    for block, cols, batches, hidden in _blocks(q, k, window):
        rows = _rows(q[:, block], heads)
        out_rows, lse_rows = torch.empty_like(rows), torch.empty_like(rows[..., :1])
        for batch in batches:
            scores = _scores(rows[batch], keys[batch, cols], hidden)
            highest = scores.amax(-1, keepdim=True).mul_(scale * LOG2_E)
            torch.sub(scores.mul_(scale * LOG2_E), highest, out=scores).exp2_()
            sums = scores.sum(-1, keepdim=True)
            out_rows[batch] = torch.bmm(scores, values[batch, cols]).div_(sums)
            lse_rows[batch] = highest.add_(sums.log2_())
        out[:, block] = _tokens(out_rows, out[:, block])
        lse[:, block] = _tokens(lse_rows, lse[:, block, :, None])[..., 0]
    return out, lse


def _rows(x: Tensor, key_heads: int) -> Tensor:
    """[b, s, h, p] -> [b * hk, s * m, p], contiguous."""
    b, s, h, p = x.shape
    return x.reshape(b, s, key_heads, h // key_heads, p).transpose(1, 2).reshape(b * key_heads, -1, p)


def _tokens(rows: Tensor, like: Tensor) -> Tensor:
    """`_rows` undone."""
    b, s, h, p = like.shape
    return rows.view(b, len(rows) // b, s, -1, p).transpose(1, 2).reshape(b, s, h, p)


def _blocks(q: Tensor, k: Tensor, window: int | None) -> Iterator[tuple[slice, slice, list[slice], Tensor]]:
    """(queries, their keys, documents x key heads taken at a time, which of the last keys each query does not see)."""
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    batch, before = q.shape[0] * k.shape[2], k.shape[1] - length
    size = max(1, BLOCK_ELEMENTS // (QUERIES * group * k.shape[1]))
    batches = [slice(i, i + size) for i in range(0, batch, size)]
    for start in range(0, length, QUERIES):
        end = min(start + QUERIES, length)
        first, last = before + start, before + end
        first_key = 0 if window is None else max(0, first - window + 1)
        # Without a window only the square on the diagonal has hidden keys.
        hidden = _hidden(first, last, first if window is None else first_key, window, q.device)
        yield slice(start, end), slice(first_key, last), batches, hidden


def _scores(queries: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
    """[b * hk, rows, keys] unscaled, -inf where hidden."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    last = scores[..., scores.shape[-1] - hidden.shape[1] :]
    last.unflatten(1, (len(hidden), -1)).masked_fill_(hidden[:, None], -math.inf)
    return scores


def attention_decode(
    q: Tensor, cache: PagedCache, block_table: Tensor, lengths: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Attention of each row's newest token over its sequence: q [b, h, p] -> [b, h, p].

    block_table [b, L] int32: the blocks of each sequence in order (any valid block beyond its end); lengths [b] int32:
    tokens in it, the newest one included, whose key and value are already written. Rows may share blocks.
    window w: the newest token sees the last w tokens, itself included.
    """
    acc, (b, heads, head_dim), key_heads = accumulate_dtype(q.dtype), q.shape, cache.keys.shape[2]
    pairs = pairs_of(block_table, lengths, cache.block_len, window)
    keys, values = cache.keys.permute(0, 2, 3, 1), cache.values.transpose(1, 2)  # [blocks, hk, p, block_len] and back
    by_head = (key_heads, heads // key_heads)
    mine = q.reshape(b, -1).index_select(0, pairs.rows).view(-1, *by_head, head_dim)
    scores = pairs.fast_product(mine, keys).flatten(1, 2).to(acc)
    scores = torch.add(pairs.hidden, scores, alpha=scale * LOG2_E)  # [N, h, block_len]
    rows = pairs.rows[:, None].expand(-1, heads)
    highest = scores.new_full((b, heads), -math.inf).scatter_reduce_(0, rows, scores.amax(-1), "amax")
    weights = scores.sub_(highest.index_select(0, pairs.rows)[..., None]).exp2_()
    sums = weights.new_zeros(b, heads).index_add_(0, pairs.rows, weights.sum(-1))
    out = pairs.fast_product(weights.to(q.dtype).unflatten(1, by_head), values).flatten(1).to(acc)
    out = out.new_zeros(b, heads * head_dim).index_add_(0, pairs.rows, out)
    return out.view(q.shape).div_(sums[..., None]).to(q.dtype)
