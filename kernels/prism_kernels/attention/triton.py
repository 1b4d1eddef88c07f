"""Causal attention within packed documents, forward and backward, in Triton for Hopper: FlashAttention's algorithm.

Blocks of queries and keys come from tables of the host's: none crosses a document, so a block of queries starts its
document's keys at the first and never meets another's. A document may have more keys than queries, which are then its
last tokens: what a context-parallel rank has of it. Key blocks that are hidden altogether, above
the diagonal or before the window, are not visited; those on the diagonal or on the window's edge are masked, the others
are not. Longest loops are started first. Softmax is in base 2 with the scale folded into the exponent.

Backward computes dK and dV in one kernel (a program owns keys and loops over its group's query heads and their later
queries) and dQ in another: seven products against the five of a kernel that adds dQ atomically, and deterministic.
"""

# t packed tokens, tk those of the keys, h query heads, hk key heads, p head_dim; m query heads of one key head

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from prism_kernels.attention.decode import HEAD_DIMS, MULTIPROCESSORS, attention_decode
from prism_kernels.backends import Uncovered
from prism_kernels.boundaries import Boundaries, copied, longest_document
from prism_kernels.precision import HALF, LOG2_E

__all__ = ["attention", "attention_decode"]


@dataclass(frozen=True)
class Config:
    """Tile of one kernel: `own` rows stay with a program, `other` rows are met in each step of its loop."""

    own: int
    other: int
    num_warps: int
    num_stages: int
    registers: int | None = None  # of a thread at most


# Chosen by what compiles for sm_90 without a spill, all products wgmma; not measured. At head_dim 128 one program of
# two warpgroups fills a multiprocessor's registers (forward 244, dK and dV 255, dQ 180 a thread). Blocks are read by
# the copy engine: with pointers, forward with a window and dK and dV spilled.
# At 64, two programs of forward (117) and of dQ (134, or 128 without a spill) fit.
FORWARD = {128: Config(128, 128, 8, 2), 64: Config(128, 64, 8, 3)}
BACKWARD_KEYS = {128: Config(128, 64, 8, 2), 64: Config(128, 64, 8, 2)}
BACKWARD_QUERIES = {128: Config(128, 64, 8, 2), 64: Config(128, 64, 8, 2, registers=128)}


def _config(table: dict[int, Config], head_dim: int) -> Config:
    return table[max(head_dim, 64)]


@triton.jit
def _visible(query, key, window, WINDOWED: tl.constexpr):
    visible = key <= query
    if WINDOWED:
        visible &= key > query - window
    return visible


@triton.jit
def _first_keys(first, start, window, OWN: tl.constexpr, OTHER: tl.constexpr, WINDOWED: tl.constexpr):
    """(first key block any query of the block sees, first one that all see, first one that not all see any more).

    first: the block's first query's place among the keys; `start` where there is no window.
    """
    whole = start + (first - start) // OTHER * OTHER
    some, every = start, start
    if WINDOWED:
        some = start + tl.maximum(first - window + 1 - start, 0) // OTHER * OTHER
        every = start + (tl.maximum(first + OWN - window - start, 0) + OTHER - 1) // OTHER * OTHER
        every = tl.minimum(every, whole)
    return some, every, whole


@triton.jit
def _attend(
    acc, total, highest, q, k, v, k_column, v_column, key, queries, end, scale, window,
    OTHER: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """One block of keys of the online softmax: acc, total and highest (base 2, scaled) move on."""
    scores = tl.dot(q, tl.trans(k.load([key, k_column])))
    if MASKED:
        visible = _visible(queries[:, None], (key + tl.arange(0, OTHER))[None, :], window, WINDOWED)
        scores = tl.where(visible, scores, float("-inf"))
    new = tl.maximum(highest, tl.max(scores, 1) * scale)
    base = new
    if MASKED and WINDOWED:  # a query may see no key of this block and none before
        base = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(highest - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v.load([key, v_column]), acc * shrink[:, None])
    return acc, total, new


@triton.jit
def _forward_kernel(
    q, k, v, out, lse, blocks, num_tokens, scale, window,
    q_head_stride, k_head_stride, v_head_stride, out_stride,
    GROUP: tl.constexpr, P: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    head, block = tl.program_id(0), blocks + 4 * tl.program_id(1)
    first, start, end, shift = tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    rows, width = first + tl.arange(0, OWN), tl.arange(0, P)
    queries = rows + shift  # their places among the keys, as are `some`, `every` and `whole`
    q = q.load([first, head * q_head_stride])
    k_column, v_column = head // GROUP * k_head_stride, head // GROUP * v_head_stride
    acc = tl.zeros((OWN, P), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    highest = tl.full((OWN,), float("-inf"), tl.float32)
    some, every, whole = _first_keys(first + shift, start, window, OWN, OTHER, WINDOWED)
    for key in range(every, whole, OTHER):
        acc, total, highest = _attend(
            acc, total, highest, q, k, v, k_column, v_column, key, queries, end, scale, window,
            OTHER, False, WINDOWED,
        )  # fmt: skip
    for key in range(whole, shift + tl.minimum(first + OWN, end), OTHER):
        acc, total, highest = _attend(
            acc, total, highest, q, k, v, k_column, v_column, key, queries, end, scale, window,
            OTHER, True, WINDOWED,
        )  # fmt: skip
    if WINDOWED:
        for key in range(some, every, OTHER):
            acc, total, highest = _attend(
                acc, total, highest, q, k, v, k_column, v_column, key, queries, end, scale, window,
                OTHER, True, WINDOWED,
            )  # fmt: skip
    if WINDOWED:
        total = tl.where(total == 0.0, 1.0, total)  # rows beyond the document may have seen nothing
    inside = rows < end
    place = out + head * P + rows.to(tl.int64)[:, None] * out_stride + width
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + head.to(tl.int64) * num_tokens + rows, highest + tl.log2(total), mask=inside)


@triton.jit
def _delta_kernel(
    out, grad, delta, num_tokens, out_stride, grad_stride, grad_head_stride,
    P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta [h, t] = sum over p of out * grad."""
    head = tl.program_id(0)
    rows, width = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, P)
    inside, far = rows < num_tokens, rows.to(tl.int64)[:, None]
    o = tl.load(out + far * out_stride + head * P + width, mask=inside[:, None], other=0.0).to(tl.float32)
    g = tl.load(grad + far * grad_stride + head * grad_head_stride + width, mask=inside[:, None], other=0.0)
    at = head.to(tl.int64) * num_tokens + rows
    tl.store(delta + at, tl.sum(o * g.to(tl.float32), 1), mask=inside)


@triton.jit
def _add_to_keys(
    grad_k, grad_v, k, v, q, grad, lse, delta, head, query, keys, end,
    num_tokens, q_head_stride, grad_head_stride, scale, window,
    OTHER: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: what it adds to the gradients of keys (unscaled) and of values.

    Scores are [keys, queries]: both products that follow take them from registers.
    """
    cols = tl.arange(0, OTHER)
    q, grad = q.load([query, head * q_head_stride]), grad.load([query, head * grad_head_stride])
    at = tl.cast(head, tl.int64) * num_tokens + query + cols
    inside = query + cols < end
    level = tl.load(lse + at, mask=inside, other=float("inf"))  # no weight beyond the document
    mean = tl.load(delta + at, mask=inside, other=0.0)
    weights = tl.exp2(tl.dot(k, tl.trans(q)) * scale - level[None, :])
    if MASKED:
        weights = tl.where(_visible((query + cols)[None, :], keys[:, None], window, WINDOWED), weights, 0.0)
    grad_v = tl.dot(weights.to(grad.dtype), grad, grad_v)
    grad_scores = weights * (tl.dot(v, tl.trans(grad)) - mean[None, :])
    grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k)
    return grad_k, grad_v


@triton.jit
def _keys_kernel(
    q, k, v, grad, lse, delta, grad_k, grad_v, blocks, num_tokens, num_keys, scale, scale_log2, window,
    q_head_stride, k_head_stride, v_head_stride, grad_head_stride,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, P: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values [splits, tk, hk, p]: program (key head and part of its group, block of keys)."""
    key_head, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    key_heads, block = tl.num_programs(0) // SPLITS, blocks + 4 * tl.program_id(1)
    first, last, start, end = tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    rows, width = first + tl.arange(0, OWN), tl.arange(0, P)
    k, v = k.load([first, key_head * k_head_stride]), v.load([first, key_head * v_head_stride])
    acc_k, acc_v = tl.zeros((OWN, P), tl.float32), tl.zeros((OWN, P), tl.float32)
    own = first - last + end  # the first key's place among the queries, as are all that follow: queries are the last
    keys = own + tl.arange(0, OWN)
    # Queries from `seeing` on see some key of the block, from `after` on all of them; up to `beyond` some, up to
    # `every` all.
    seeing = tl.maximum(own, start)
    diagonal, edge = tl.cdiv(tl.minimum(tl.maximum(own + OWN, seeing), end) - seeing, OTHER), 0
    after = seeing + diagonal * OTHER
    every, beyond = end, end
    if WINDOWED:
        beyond = tl.minimum(end, own + OWN - 1 + window)
        every = after + tl.maximum(own + window - after, 0) // OTHER * OTHER
        edge = tl.cdiv(tl.maximum(beyond - every, 0), OTHER)
    heads: tl.constexpr = GROUP // SPLITS
    head = key_head * GROUP + split * heads
    # All heads of the group in one loop, masked blocks first: fewer values live across it than with a loop per head,
    # and the next head's first block is on its way while the last one's is worked on. Moving invariants out of the
    # loops would spill.
    for i in tl.range(heads * (diagonal + edge), disable_licm=True):
        step = i % (diagonal + edge)
        query = seeing + step * OTHER
        if WINDOWED:
            query = tl.where(step < diagonal, query, every + (step - diagonal) * OTHER)
        acc_k, acc_v = _add_to_keys(
            acc_k, acc_v, k, v, q, grad, lse, delta, head + i // (diagonal + edge), query, keys, end,
            num_tokens, q_head_stride, grad_head_stride, scale_log2, window, OTHER, True, WINDOWED,
        )  # fmt: skip
    between = tl.cdiv(tl.maximum(tl.minimum(every, beyond) - after, 0), OTHER)
    for i in tl.range(heads * between, disable_licm=True):
        acc_k, acc_v = _add_to_keys(
            acc_k, acc_v, k, v, q, grad, lse, delta, head + i // between, after + i % between * OTHER, keys, end,
            num_tokens, q_head_stride, grad_head_stride, scale_log2, window, OTHER, False, WINDOWED,
        )  # fmt: skip
    place = ((split.to(tl.int64) * num_keys + rows)[:, None] * key_heads + key_head) * P + width
    tl.store(grad_k + place, (acc_k * scale).to(grad_k.dtype.element_ty), mask=(rows < last)[:, None])
    tl.store(grad_v + place, acc_v.to(grad_v.dtype.element_ty), mask=(rows < last)[:, None])


@triton.jit
def _add_to_queries(
    acc, q, grad, level, mean, k, v, k_column, v_column, key, queries, end, scale, window,
    OTHER: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """One block of keys: what it adds to the gradient of queries, unscaled."""
    k, v = k.load([key, k_column]), v.load([key, v_column])
    weights = tl.exp2(tl.dot(q, tl.trans(k)) * scale - level[:, None])
    if MASKED:
        visible = _visible(queries[:, None], (key + tl.arange(0, OTHER))[None, :], window, WINDOWED)
        weights = tl.where(visible, weights, 0.0)
    grad_scores = weights * (tl.dot(grad, tl.trans(v)) - mean[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, acc)


@triton.jit
def _queries_kernel(
    q, k, v, grad, lse, delta, grad_q, blocks, num_tokens, scale, scale_log2, window,
    q_head_stride, k_head_stride, v_head_stride, grad_head_stride,
    grad_q_stride,
    GROUP: tl.constexpr, P: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    head, block = tl.program_id(0), blocks + 4 * tl.program_id(1)
    first, start, end, shift = tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    rows, width = first + tl.arange(0, OWN), tl.arange(0, P)
    queries = rows + shift  # their places among the keys, as are `some`, `every` and `whole`
    inside = rows < end
    q, grad = q.load([first, head * q_head_stride]), grad.load([first, head * grad_head_stride])
    at = head.to(tl.int64) * num_tokens + rows
    level = tl.load(lse + at, mask=inside, other=float("inf"))
    mean = tl.load(delta + at, mask=inside, other=0.0)
    k_column, v_column = head // GROUP * k_head_stride, head // GROUP * v_head_stride
    acc = tl.zeros((OWN, P), tl.float32)
    some, every, whole = _first_keys(first + shift, start, window, OWN, OTHER, WINDOWED)
    for key in range(every, whole, OTHER):
        acc = _add_to_queries(
            acc, q, grad, level, mean, k, v, k_column, v_column, key, queries, end, scale_log2, window,
            OTHER, False, WINDOWED,
        )  # fmt: skip
    for key in range(whole, shift + tl.minimum(first + OWN, end), OTHER):
        acc = _add_to_queries(
            acc, q, grad, level, mean, k, v, k_column, v_column, key, queries, end, scale_log2, window,
            OTHER, True, WINDOWED,
        )  # fmt: skip
    if WINDOWED:
        for key in range(some, every, OTHER):
            acc = _add_to_queries(
                acc, q, grad, level, mean, k, v, k_column, v_column, key, queries, end, scale_log2, window,
                OTHER, True, WINDOWED,
            )  # fmt: skip
    place = grad_q + head * P + rows.to(tl.int64)[:, None] * grad_q_stride + width
    tl.store(place, (acc * scale).to(grad_q.dtype.element_ty), mask=inside[:, None])


def _tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """Tiles [rows, p] of one head of x [t, h, p] for the copy engine (TMA); tokens beyond t read as zeros."""
    t, h, p = x.shape
    return TensorDescriptor(x, [t, (h - 1) * x.stride(1) + p], [x.stride(0), 1], [rows, p])


def _rows_of_16_bytes(x: Tensor) -> Tensor:
    """x, or a copy, with p contiguous and every row and head at a multiple of 16 bytes."""
    aligned = x.stride(2) == 1 and not (x.stride(0) % 8 or x.stride(1) % 8 or x.storage_offset() % 8)
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def query_blocks(boundaries: Boundaries, keys: Boundaries, length: int) -> Tensor:
    """Blocks of at most `length` queries, none across documents: [blocks, 4] int32, those that see most keys first.

    Each is (its first query, its document's first key, the one after its document's last query, how much further on
    among the keys a query's own key is).
    """

    def build() -> list[tuple[int, ...]]:
        rows = [
            (at, keys.offsets[i], end, keys.offsets[i + 1] - end)
            for i, start, end in boundaries.documents
            for at in range(start, end, length)
        ]
        return sorted(rows, key=lambda row: row[1] - row[0] - row[3])

    return _table(boundaries, ("queries", keys, length), build)


def key_blocks(boundaries: Boundaries, keys: Boundaries, length: int) -> Tensor:
    """Blocks of at most `length` keys, none across documents: [blocks, 4] int32, those that most queries see first.

    Each is (its first key, the one after its document's last key, its document's first query, the one after its last).
    """

    def build() -> list[tuple[int, ...]]:
        rows = [
            (at, end, *boundaries.offsets[i : i + 2])
            for i, start, end in keys.documents
            for at in range(start, end, length)
        ]
        return sorted(rows, key=lambda row: max(row[0] - row[1], row[2] - row[3]))

    return _table(boundaries, ("keys", keys, length), build)


def _table(boundaries: Boundaries, name: tuple, build: Callable[[], list[tuple[int, ...]]]) -> Tensor:
    """Built once for all layers of a micro-batch."""
    known = boundaries.derive(_tables)
    if name not in known:
        known[name] = copied(torch.tensor(build(), dtype=torch.int32), boundaries.cu_seqlens.device)
    return known[name]


def _tables(boundaries: Boundaries) -> dict[tuple, Tensor]:
    return {}


def _splits(group: int, programs: int) -> int:
    """Parts of a group of query heads in dK and dV's kernel: enough programs for every multiprocessor to have two."""
    divisors = [n for n in range(1, group + 1) if group % n == 0]
    return next((n for n in divisors if n * programs >= 2 * MULTIPROCESSORS), group)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, boundaries, keys, scale, window):
        q, k, v = _rows_of_16_bytes(q), _rows_of_16_bytes(k), _rows_of_16_bytes(v)
        (t, h, p), config = q.shape, _config(FORWARD, q.shape[2])
        out, lse = q.new_empty(t, h, p), q.new_empty(h, t, dtype=torch.float32)
        blocks = query_blocks(boundaries, keys, config.own)
        _forward_kernel[(h, len(blocks))](
            _tiles(q, config.own), _tiles(k, config.other), _tiles(v, config.other), out, lse, blocks,
            t, scale * LOG2_E, window, q.stride(1), k.stride(1), v.stride(1), h * p,
            GROUP=h // k.shape[1], P=p, OWN=config.own, OTHER=config.other, WINDOWED=window is not None,
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.registers,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.boundaries, ctx.keys, ctx.scale, ctx.window = boundaries, keys, scale, window
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        grad = _rows_of_16_bytes(grad)
        (t, h, p), rows = q.shape, 8192 // q.shape[2]
        delta = torch.empty_like(lse)
        _delta_kernel[(h, triton.cdiv(t, rows))](
            out, grad, delta, t, h * p, grad.stride(0), grad.stride(1),
            P=p, ROWS=rows, num_warps=4,
        )  # fmt: skip
        inputs = (q, k, v, grad, lse, delta)
        return _grad_queries(ctx, *inputs), *_grad_keys_values(ctx, *inputs), *(None,) * 4


def _grad_queries(ctx, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    (t, h, p), config = q.shape, _config(BACKWARD_QUERIES, q.shape[2])
    grad_q, blocks = q.new_empty(t, h, p), query_blocks(ctx.boundaries, ctx.keys, config.own)
    _queries_kernel[(h, len(blocks))](
        _tiles(q, config.own), _tiles(k, config.other), _tiles(v, config.other), _tiles(grad, config.own),
        lse, delta, grad_q, blocks, t, ctx.scale, ctx.scale * LOG2_E, ctx.window,
        q.stride(1), k.stride(1), v.stride(1), grad.stride(1), h * p,
        GROUP=h // k.shape[1], P=p, OWN=config.own, OTHER=config.other, WINDOWED=ctx.window is not None,
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.registers,
    )  # fmt: skip
    return grad_q


def _grad_keys_values(
    ctx, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    (tk, key_heads, p), config = k.shape, _config(BACKWARD_KEYS, k.shape[2])
    blocks, group = key_blocks(ctx.boundaries, ctx.keys, config.own), q.shape[1] // key_heads
    splits = _splits(group, key_heads * len(blocks))
    dtype = k.dtype if splits == 1 else torch.float32
    grad_k, grad_v = (k.new_empty(splits, tk, key_heads, p, dtype=dtype) for _ in range(2))
    _keys_kernel[(key_heads * splits, len(blocks))](
        _tiles(q, config.other), _tiles(k, config.own), _tiles(v, config.own), _tiles(grad, config.other),
        lse, delta, grad_k, grad_v, blocks, len(q), tk, ctx.scale, ctx.scale * LOG2_E, ctx.window,
        q.stride(1), k.stride(1), v.stride(1), grad.stride(1),
        GROUP=group, SPLITS=splits, P=p, OWN=config.own, OTHER=config.other, WINDOWED=ctx.window is not None,
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.registers,
    )  # fmt: skip
    if splits == 1:
        return grad_k[0], grad_v[0]
    return grad_k.sum(0).to(k.dtype), grad_v.sum(0).to(k.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> None:
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if window is not None and window < 1:
        raise ValueError(f"attention: window={window}; needs at least 1 (the token itself), or None")
    if q.shape[2] not in HEAD_DIMS:
        raise Uncovered(f"head_dim {q.shape[2]}: needs one of {', '.join(map(str, HEAD_DIMS))}")
    if q.dtype not in HALF or k.dtype != q.dtype or v.dtype != q.dtype:
        raise Uncovered(f"q, k, v in {q.dtype}, {k.dtype}, {v.dtype}: needs bfloat16 or float16, one for all")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: Boundaries,
    scale: float,
    window: int | None = None,
    keys: Boundaries | None = None,
) -> Tensor:
    """Causal attention within each document: q [t, h, p], k and v [tk, hk, p] with h % hk == 0; returns [t, h, p].

    window w: query i sees keys j with i - w < j <= i, itself included. keys: where each document's keys are, its
    queries being its last tokens; None: as its queries. p is 16, 32, 64 or 128, dtype bf16 or fp16.
    FlashAttention-2 (arXiv 2307.08691) with blocks per document; see the module's docstring.
    """
    keys = boundaries if keys is None else keys
    boundaries.check(q=q)
    keys.check(k=k, v=v)
    boundaries.check_keys(keys)
    _check(q, k, v, window)
    longest = keys.derive(longest_document)
    return _Attention.apply(q, k, v, boundaries, keys, scale, None if window is None or window >= longest else window)
