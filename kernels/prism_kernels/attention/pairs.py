"""Which blocks of a paged cache each row of a decode step sees, in an order in which memory is read as it lies.

On a CPU a decode step is bound by reading the caches: each is read once, and none of it gathered as a whole.
"""

# b rows, hk key heads, m = h / hk, L longest context in blocks, N (row, block) pairs in use, u blocks that rows share,
# r rows of one of them

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pairs:
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
def _bags(pairs: Pairs, key_heads: int, m: int, i: int) -> tuple[Tensor, Tensor]:
    """Rows of the flattened blocks [. * hk * i, j] that each (pair, query head) adds up, one after the other, and where
    each of them begins; int64."""
    heads = (pairs.blocks[:, None] * key_heads + torch.arange(key_heads)).flatten().repeat_interleave(m)
    rows = (heads[:, None] * i + torch.arange(i)).flatten()
    return rows, torch.arange(0, len(rows), i)


SPAN_GAP = 4  # blocks seen by nobody that are read along: cheaper than starting another product
_last_pairs: tuple[tuple, tuple[Tensor, Tensor], Pairs] | None = None


def pairs_of(block_table: Tensor, lengths: Tensor, block_len: int, window: int | None) -> Pairs:
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


def _find_pairs(block_table: Tensor, lengths: Tensor, block_len: int, window: int | None) -> Pairs:
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
    return Pairs(
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
