"""The ops of a decode step in plain torch: one new token for each of b running sequences.

On a CPU a decode step is bound by reading the caches: each op reads its cache once and gathers none of it as a whole.
"""

# b rows, c channels, h heads, hk key heads, m = h / hk, p head_dim, g groups, n state
# L longest context in blocks, N (row, block) pairs in use, u blocks that rows share, r rows of one of them

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prism_kernels.boundaries import Boundaries
from prism_kernels.caches import ConvCache, PagedCache, ScanCache
from prism_kernels.matmul import mm
from prism_kernels.precision import accumulate_dtype
from prism_kernels.reference_loss import CHUNK_ROWS, LOG2_E
from prism_kernels.reference_scan import ssd_scan

STATE_ELEMENTS = 2**17  # of scan states worked on at a time: 512 KiB in fp32 stay in a core's L2 cache


def conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, cache: ConvCache, slots: Tensor, silu: bool = True
) -> Tensor:
    """`causal_conv1d` of one token for each row: x [b, c] -> [b, c]; the rows' slots [b] int64 of the cache move on."""
    acc, by_tap = accumulate_dtype(x.dtype), weight.t().contiguous().to(accumulate_dtype(x.dtype))
    inputs = cache.state.transpose(1, 2)  # [slots, k - 1, c]
    window = torch.cat([inputs.index_select(0, slots), x[:, None].to(inputs.dtype)], 1)
    inputs.index_copy_(0, slots, window[:, 1:])
    y = x.to(acc) * by_tap[-1]
    for tap in range(len(by_tap) - 1):
        y.addcmul_(window[:, tap].to(acc), by_tap[tap])
    y = y if bias is None else y.add_(bias)
    return (F.silu(y, inplace=True) if silu else y).to(x.dtype)


def ssd_cache(
    slots: int, heads: int, head_dim: int, groups: int, state: int, dtype: torch.dtype, device: torch.device
) -> ScanCache:
    """An empty cache for `ssd_prefill` and `ssd_step`; dtype is that of the activations."""
    shape = (slots, heads, head_dim, state)
    return ScanCache(torch.zeros(shape, dtype=accumulate_dtype(dtype), device=device))


def ssd_prefill(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor,
    boundaries: Boundaries,
    chunk_len: int,
    dt_limit: tuple[float, float],
    cache: ScanCache,
    slots: Tensor,
) -> Tensor:
    """`ssd_scan` of whole documents whose states go on in slots [documents] int64 of the cache: y [t, h, p]."""
    inputs = (x, dt, A_log, B, C, D, dt_bias, boundaries, chunk_len, dt_limit)
    y, final = ssd_scan(*inputs, return_final_states=True)
    cache.state[slots] = final.to(cache.state.dtype)
    return y


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor,
    cache: ScanCache,
    slots: Tensor,
    positions: Tensor,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """`ssd_scan` of one token for each row: x [b, h, p], dt [b, h], B and C [b, g, n] -> [b, h, p].

    slots [b] int64: the rows' places in the cache, which move on; positions [b] int64: the token's place in its
    document, for caches that restart at each chunk (not this one).
    """
    acc, (b, heads, head_dim), (groups, n) = accumulate_dtype(x.dtype), x.shape, B.shape[1:]
    step = F.softplus(dt.to(acc) + dt_bias.to(acc)).clamp(*dt_limit)
    decay = (step * -A_log.to(acc).exp()).exp()[..., None, None]
    wide, by_group = x.to(acc), (b, groups, heads // groups, -1)
    scaled = (wide * step[..., None]).view(*by_group, 1)
    B, C = (y.to(acc)[:, :, None, None] for y in (B, C))  # [b, g, 1, 1, n]
    y = torch.empty_like(wide, memory_format=torch.contiguous_format).view(by_group)  # [b, g, h / g, p]
    rows = max(1, STATE_ELEMENTS // (heads * head_dim * n)) if x.device.type == "cpu" else b
    for start in range(0, b, rows):
        part = slice(start, min(start + rows, b))
        place = _consecutive(slots[part])
        state = cache.state[place] if isinstance(place, slice) else cache.state.index_select(0, place)
        grouped = state.mul_(decay[part]).unflatten(1, (groups, -1))
        grouped.addcmul_(scaled[part], B[part])
        torch.sum(grouped * C[part], -1, out=y[part])  # twice as fast as a product with one column
        if not isinstance(place, slice):
            cache.state.index_copy_(0, place, state)
    y = y.view(wide.shape)
    return (y if D is None else y.addcmul_(wide, D.to(acc)[:, None])).to(x.dtype)


def _consecutive(slots: Tensor) -> slice | Tensor:
    """The slots as a slice where they follow one another: states are then changed where they are."""
    if slots.device.type != "cpu":
        return slots
    places = slots.tolist()
    first, end = places[0], places[0] + len(places)
    return slice(first, end) if places == [*range(first, end)] else slots


def attention_decode(
    q: Tensor, cache: PagedCache, block_table: Tensor, lengths: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Attention of each row's newest token over its sequence: q [b, h, p] -> [b, h, p].

    block_table [b, L] int32: the blocks of each sequence in order (any valid block beyond its end); lengths [b] int32:
    tokens in it, the newest one included, whose key and value are already written. Rows may share blocks.
    window w: the newest token sees the last w tokens, itself included.
    """
    acc, (b, heads, head_dim), key_heads = accumulate_dtype(q.dtype), q.shape, cache.keys.shape[2]
    pairs = _pairs_of(block_table, lengths, cache.block_len, window)
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


def lm_logits(hidden: Tensor, weight: Tensor, divisor: float) -> Tensor:
    """hidden [n, d], weight [v, d] -> hidden @ weight.T / divisor, [n, v] fp32: never rounded to a narrower dtype.

    No autograd. On a CPU a bf16 weight is widened in blocks, as in `linear_cross_entropy(fp32_logits=True)`.
    """
    acc = accumulate_dtype(hidden.dtype)
    if hidden.dtype == acc:
        logits = mm(hidden, weight.t())
    elif hidden.device.type == "cuda":
        logits = torch.mm(hidden, weight.t(), out_dtype=acc)
    else:
        wide = hidden.to(acc)
        logits = torch.cat([mm(wide, block.to(acc).t()) for block in weight.split(CHUNK_ROWS)], 1)
    return logits if divisor == 1 else logits.div_(divisor)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """(row, block) for every block a row sees, in an order in which blocks are read from memory as they lie.

    First the blocks that one row sees, span by span: consecutive blocks, a few of them seen by nobody (their pair has
    row 0 and all keys hidden). Then blocks that several rows share, as samples of one prompt do: they are read once for
    all their rows.
    """

    rows: Tensor  # [N] int64
    blocks: Tensor  # [N] int64
    hidden: Tensor  # [N, 1, block_len] fp32: -inf where the row does not see the key, else 0
    in_order: tuple[Tensor, Tensor]  # real pairs by row and position, and their rows: exact sums need one order
    spans: list[tuple[int, int, int]]  # (first pair, first block, number of blocks)
    num_exclusive: int  # pairs before those of shared blocks
    shared: slice | Tensor  # u blocks of several rows
    sharers: Tensor  # [u, r] int64: pairs of each, the last one repeated where there are fewer than r
    place: (
        Tensor | None
    )  # [N - num_exclusive] int64: where in the flattened `sharers` each pair is; None: all, in order

    def product(self, left: Tensor, blocks: Tensor) -> Tensor:
        """left [N, hk, m, i] times each pair's block of `blocks` [., hk, i, j] -> [N, hk, m, j]."""
        out = torch.empty(*left.shape[:3], blocks.shape[3], dtype=left.dtype, device=left.device)
        for pair, block, count in self.spans:
            mine, theirs = left[pair : pair + count].flatten(0, 1), blocks[block : block + count].flatten(0, 1)
            torch.bmm(mine, theirs, out=out[pair : pair + count].flatten(0, 1))
        if len(self.sharers):
            (u, r), (key_heads, m) = self.sharers.shape, left.shape[1:3]
            mine = left[self.num_exclusive :] if self.place is None else left[self.sharers]
            mine = mine.reshape(u, r, key_heads, m, -1).transpose(1, 2).reshape(u * key_heads, r * m, -1)
            both = torch.bmm(mine, blocks[self.shared].flatten(0, 1)).view(u, key_heads, r, m, -1).transpose(1, 2)
            if self.place is None:
                out[self.num_exclusive :].view(both.shape).copy_(both)
            else:
                out[self.num_exclusive :] = both.flatten(0, 1)[self.place]
        return out

    def fast_product(self, left: Tensor, blocks: Tensor) -> Tensor:
        """`product`, its sums in another order: where a cache is laid out for it, an embedding bag takes half the time
        of so many small products on a CPU."""
        if left.dtype != torch.float32 or left.device.type != "cpu" or not blocks.is_contiguous():
            return self.product(left, blocks)
        rows, starts = _bags(self, *left.shape[1:])
        out = F.embedding_bag(rows, blocks.flatten(0, 2), starts, mode="sum", per_sample_weights=left.flatten())
        return out.view(*left.shape[:3], -1)


@lru_cache(maxsize=2)  # keys and values; the layers of a decode step ask one after another
def _bags(pairs: _Pairs, key_heads: int, m: int, i: int) -> tuple[Tensor, Tensor]:
    """Rows of the flattened blocks [. * hk * i, j] that each (pair, query head) adds up, one after the other, and where
    each of them begins; int64."""
    heads = (pairs.blocks[:, None] * key_heads + torch.arange(key_heads)).flatten().repeat_interleave(m)
    rows = (heads[:, None] * i + torch.arange(i)).flatten()
    return rows, torch.arange(0, len(rows), i)


SPAN_GAP = 4  # blocks seen by nobody that are read along: cheaper than starting another product
_last_pairs: tuple[tuple, tuple[Tensor, Tensor], _Pairs] | None = None


def _pairs_of(block_table: Tensor, lengths: Tensor, block_len: int, window: int | None) -> _Pairs:
    """The layers of a decode step ask the same question one after another: the last answer is kept."""
    global _last_pairs
    if _last_pairs is not None:
        case, (table, ends), pairs = _last_pairs
        same = case == (block_len, window, block_table.device)
        if same and torch.equal(table, block_table) and torch.equal(ends, lengths):
            return pairs
    pairs = _find_pairs(block_table, lengths, block_len, window)
    _last_pairs = (block_len, window, block_table.device), (block_table.clone(), lengths.clone()), pairs
    return pairs


def _find_pairs(block_table: Tensor, lengths: Tensor, block_len: int, window: int | None) -> _Pairs:
    device = block_table.device
    table, ends = block_table.cpu().numpy().astype(np.int64), lengths.cpu().numpy().astype(np.int64)
    starts = np.arange(table.shape[1]) * block_len
    seen = starts < ends[:, None]
    if window is not None:
        seen &= starts + block_len > ends[:, None] - window
    rows, numbers = seen.nonzero()
    blocks = table[rows, numbers]
    order = np.argsort(blocks, kind="stable")
    alone = np.bincount(blocks)[blocks[order]] == 1
    order = np.concatenate([order[alone], order[~alone]])  # pair, as listed by `seen` -> in the order of memory
    num_alone = int(alone.sum())

    exclusive = blocks[order[:num_alone]]
    spans, place = _spans(exclusive)
    num_exclusive = spans[-1][0] + spans[-1][2] if spans else 0
    shared, first, counts = np.unique(blocks[order[num_alone:]], return_index=True, return_counts=True)
    r = int(counts.max(initial=0))
    sharers = num_exclusive + first[:, None] + np.minimum(np.arange(r), counts[:, None] - 1)
    turn = np.arange(len(order) - num_alone) - first.repeat(counts)
    where = np.empty(len(order), np.int64)  # of each pair as listed by `seen`
    where[order] = np.concatenate([place, num_exclusive + np.arange(len(order) - num_alone)])

    total = num_exclusive + len(order) - num_alone
    pair_rows, hidden = np.zeros(total, np.int64), np.full((total, 1, block_len), -np.inf, np.float32)
    pair_rows[where] = rows
    pair_blocks = [np.arange(block, block + count) for _, block, count in spans] + [shared.repeat(counts)]
    tokens = starts[numbers, None] + np.arange(block_len)
    visible = tokens < ends[rows, None]
    if window is not None:
        visible &= tokens >= ends[rows, None] - window
    hidden[where, 0] = np.where(visible, 0, -np.inf)

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device)

    u, even = len(shared), (counts == r).all()
    in_a_row = u > 0 and shared[-1] - shared[0] == u - 1
    return _Pairs(
        rows=tensor(pair_rows),
        blocks=tensor(np.concatenate(pair_blocks)),
        hidden=tensor(hidden),
        in_order=(tensor(where), tensor(rows)),
        spans=spans,
        num_exclusive=num_exclusive,
        shared=slice(int(shared[0]), int(shared[-1]) + 1) if in_a_row else tensor(shared),
        sharers=tensor(sharers),
        place=None if even else tensor(np.repeat(np.arange(u) * r, counts) + turn),
    )


def _spans(blocks: np.ndarray) -> tuple[list[tuple[int, int, int]], np.ndarray]:
    """Rising blocks [n] -> spans (first pair, first block, blocks) with gaps of up to SPAN_GAP, and each one's pair."""
    if not len(blocks):
        return [], blocks
    cuts = np.flatnonzero(np.diff(blocks) > SPAN_GAP + 1) + 1
    starts, lasts = blocks[np.r_[0, cuts]], blocks[np.r_[cuts - 1, len(blocks) - 1]]
    sizes = lasts - starts + 1
    firsts = np.cumsum(sizes) - sizes
    pairs = blocks + np.repeat(firsts - starts, np.diff(np.r_[0, cuts, len(blocks)]))
    return list(zip(firsts.tolist(), starts.tolist(), sizes.tolist(), strict=True)), pairs
