"""Attention of one new token per sequence over the paged cache, in Triton: all query heads of a key head in one tile.

Reading keys and values is all the work: each is read once, by one program, for every query head that needs it. Where
rows x key heads are too few programs to keep every multiprocessor reading, a context is cut into parts by more programs
(flash-decoding) and a second kernel puts the parts together. The host never learns a length: grids depend on shapes
alone, so that a step can be captured in a CUDA graph.
"""

# b rows, h query heads, hk key heads, p head_dim, L longest context in blocks

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.backends import Uncovered
from prism_kernels.caches import PagedCache
from prism_kernels.precision import LOG2_E

HEAD_DIMS = (16, 32, 64, 128)  # of training's kernels, too
MULTIPROCESSORS = 132
# fp32, too: within a CUDA graph there is no way back to the reference, which reads the lengths on the host.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Keys in a step of the loop; five stages hold two tiles of keys and two of values (a block's number is loaded first).
# 72 KB at head_dim 128: three programs a multiprocessor. What fits, not measured.
KEYS, NUM_WARPS, NUM_STAGES = 64, 4, 5
PROGRAMS = 4 * MULTIPROCESSORS  # two waves: unequal lengths even out
SHORTEST_PART = 256  # tokens; below, putting parts together costs more than it gains
MOST_PARTS = 64


@triton.jit
def _decode_kernel(
    q, keys, values, block_table, lengths, out, levels, scale, window, table_stride, q_stride, q_head_stride,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, P: tl.constexpr, BLOCK_LEN: tl.constexpr,
    KEYS: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """out [parts, b, h, p] and, of more than one part, levels [parts, b, h]: log2 of the sum of exponentials."""
    key_head, row, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    rows, parts = tl.num_programs(1), tl.num_programs(2)
    length = tl.load(lengths + row).to(tl.int32)
    first = 0
    if WINDOWED:
        first = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - first, KEYS), parts) * KEYS
    begin = first + part * share
    end = tl.minimum(begin + share, length)
    heads, cols, width = tl.arange(0, TILE), tl.arange(0, KEYS), tl.arange(0, P)
    inside = heads < GROUP
    heads += key_head * GROUP
    q += row * q_stride
    q = tl.load(q + heads[:, None] * q_head_stride + width, mask=inside[:, None], other=0.0)
    keys += key_head * P + width
    values += key_head * P + width
    block_table += row * table_stride
    acc = tl.zeros((TILE, P), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    highest = tl.full((TILE,), float("-inf"), tl.float32)
    for key in range(begin, end, KEYS):
        place = key + cols
        seen = place < end
        block = tl.load(block_table + place // BLOCK_LEN, mask=seen, other=0).to(tl.int64)
        at = (block * BLOCK_LEN + place % BLOCK_LEN) * (KEY_HEADS * P)
        k = tl.load(keys + at[:, None], mask=seen[:, None], other=0.0)
        scores = tl.where(seen[None, :], tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new[:, None])
        shrink = tl.exp2(highest - new)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(values + at[:, None], mask=seen[:, None], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        highest = new
    total = tl.where(total == 0.0, 1.0, total)  # a part, or a row, of no tokens: zeros, at level -inf
    at = (part.to(tl.int64) * rows + row) * (KEY_HEADS * GROUP) + heads
    tl.store(out + at[:, None] * P + width, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
    if levels is not None:
        tl.store(levels + at, highest + tl.log2(total), mask=inside)


@triton.jit
def _join_kernel(partial, levels, out, parts, PARTS: tl.constexpr, P: tl.constexpr):
    """out [b * h, p] from partial [parts, b * h, p], each weighted with its part of the sum of exponentials."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    part, width = tl.arange(0, PARTS), tl.arange(0, P)
    at = part * rows + row
    level = tl.load(levels + at, mask=part < parts, other=float("-inf"))
    highest = tl.max(level, 0)
    weights = tl.exp2(level - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weights, 0)
    values = tl.load(partial + at[:, None] * P + width, mask=(part < parts)[:, None], other=0.0)
    y = tl.sum(values * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * P + width, y.to(out.dtype.element_ty))


def _parts(programs: int, tokens: int) -> int:
    """Parts a context of at most `tokens` is cut into, so that there are PROGRAMS programs."""
    return max(1, min(triton.cdiv(PROGRAMS, programs), tokens // SHORTEST_PART, MOST_PARTS))


def _check(q: Tensor, cache: PagedCache) -> None:
    if q.shape[2] not in HEAD_DIMS:
        raise Uncovered(f"head_dim {q.shape[2]}: needs one of {', '.join(map(str, HEAD_DIMS))}")
    if q.dtype not in DTYPES or cache.keys.dtype != q.dtype or cache.values.dtype != q.dtype:
        raise Uncovered(
            f"q in {q.dtype}, cache in {cache.keys.dtype}: needs bfloat16, float16 or float32, one for both"
        )
    if not (cache.keys.is_contiguous() and cache.values.is_contiguous()):
        raise Uncovered("a cache that is not contiguous")


def attention_decode(
    q: Tensor, cache: PagedCache, block_table: Tensor, lengths: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Attention of each row's newest token over its sequence: q [b, h, p] -> [b, h, p].

    block_table [b, L] int32: the blocks of each sequence in order (any valid block beyond its end); lengths [b] int32:
    tokens in it, the newest one included, whose key and value are already written; a row of length 0 gets zeros.
    """
    _check(q, cache)
    q, block_table = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, block_table))
    (b, h, p), key_heads, out = q.shape, cache.keys.shape[2], torch.empty_like(q, memory_format=torch.contiguous_format)
    tokens = block_table.shape[1] * cache.block_len
    parts = _parts(b * key_heads, tokens if window is None else min(tokens, window))
    partial = out if parts == 1 else q.new_empty(parts, b, h, p, dtype=torch.float32)
    levels = None if parts == 1 else q.new_empty(parts, b, h, dtype=torch.float32)
    group = h // key_heads
    _decode_kernel[(key_heads, b, parts)](
        q, cache.keys, cache.values, block_table, lengths, partial, levels, scale * LOG2_E, window,
        block_table.stride(0), q.stride(0), q.stride(1),
        KEY_HEADS=key_heads, GROUP=group, TILE=max(16, triton.next_power_of_2(group)), P=p,
        BLOCK_LEN=cache.block_len, KEYS=KEYS, WINDOWED=window is not None,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    if parts > 1:
        _join_kernel[(b * h,)](partial, levels, out, parts, PARTS=triton.next_power_of_2(parts), P=p, num_warps=2)
    return out
