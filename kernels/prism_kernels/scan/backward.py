"""The Mamba-2 scan's backward kernels: within chunks (x, D, C_i . B_j), with states (B, C), and the step sizes.

`rising_i` is the gradient of the cumulated log decay at i as a query, `falling_j` minus that as a key; both have a part
from pairs within the chunk and one from states. What pairs add to the two cancels in later sums, so it is made to
cancel to fp32: rising is a row sum of M_ij (g_i . x_j) with M rounded as the products round it, falling is
x_j . (sum_i M_ij g_i), read off the gradient of x before it is rounded, and pairs of a token with itself, which cancel
altogether and outweigh the rest where decays are strong, are left out of both.
"""

# t packed tokens, h heads, p head_dim, g groups, n state, C chunks, Q tokens in a chunk, s splits of a group's heads

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.boundaries import ScanTables
from prism_kernels.scan.forward import (
    CHUNK_COLUMNS,
    Decays,
    Shape,
    decays_to_end,
    heads_per_program,
    load_rows,
    pair_decays,
    state_tiles,
    step_and_log_decay,
    store_rows,
    tiles,
)


@triton.jit(do_not_specialize=["num_chunks"])
def inner_grads_kernel(
    x, grad, own_grad, B, C, own_C, D, query, key, total, step, query_low, key_low, total_low, chunks, states,
    grad_x, grad_scores, own_scores, rising, falling, num_heads, heads_per_group, num_chunks, grad_stride,
    HEADS: tl.constexpr, SPLITS: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    SKIP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Of R keys of one chunk and HEADS heads of one group: the gradients of x, and of C_i . B_j summed over the heads.

    states: gradients of the state after each chunk. falling [2, C, h, Q]: what pairs and what states make
    of it. rising [slots, C, h, Q]: what pairs make of it, a slot for each R keys of a chunk. own_scores [C, g, Q]:
    C_j . B_j.
    """
    slot, first_head, chunk = tl.program_id(0), tl.program_id(1) * HEADS, tl.program_id(2)
    start = slot * R
    entry = chunks + chunk * CHUNK_COLUMNS
    first, length = tl.load(entry), tl.load(entry + 1) - start
    queries_at, keys_at = tl.arange(0, Q), start + tl.arange(0, R)
    group = first_head // heads_per_group
    keys = B.load([first + start, group * N])
    scores = tl.dot(C.load([first, group * N]), tl.trans(keys), input_precision="ieee")
    own_score = tl.sum(own_C.load([first + start, group * N]).to(tl.float32) * keys.to(tl.float32), 1)
    scores = tl.where(queries_at[:, None] > keys_at[None, :], scores, 0.0)
    total_scores = tl.zeros((Q, R), tl.float32)
    array = num_chunks * num_heads * Q
    for i in tl.range(0, HEADS, disable_licm=True):
        head = first_head + i
        row = chunk * num_heads + head
        slot_row = slot * num_chunks * num_heads + row
        at = row * Q
        values = x.load([first + start, head * P])
        grads = grad.load([first, head * P])
        pairs = tl.dot(grads, tl.trans(values), input_precision="ieee")
        decays = pair_decays(query, key, query_low, key_low, at, start, Q, R, EXACT)
        mixing = (decays * scores).to(values.dtype)
        total_scores += decays * pairs
        tl.store(rising + slot_row * Q + queries_at, tl.sum(mixing.to(tl.float32) * pairs, 1))
        own = load_rows(own_grad, first + start, length, grad_stride, head * P, R, P)
        wide = values.to(tl.float32)
        out = tl.dot(tl.trans(mixing), grads, input_precision="ieee")
        tl.store(falling + at + keys_at, tl.sum(out * wide, 1))
        to_end = decays_to_end(key, total, key_low, total_low, row, at, start, R, EXACT)
        state = states.load([row * P, 0])
        from_state = tl.dot(keys, tl.trans(state), input_precision="ieee") * to_end[:, None]
        tl.store(falling + array + at + keys_at, tl.sum(from_state * wide, 1))
        factor = own_score * tl.load(step + at + keys_at)
        if SKIP:
            factor += tl.load(D + head).to(tl.float32)
        out += from_state + factor[:, None] * own.to(tl.float32)
        store_rows(grad_x, out, first + start, length, num_heads * P, head * P, R, P)
    group_row = chunk * (num_heads // heads_per_group) + group
    split = tl.program_id(1) % SPLITS
    if split == 0:
        tl.store(own_scores + group_row * Q + keys_at, own_score)
    offsets = (split + SPLITS * group_row).to(tl.int64) * (Q * Q) + queries_at[:, None] * Q + keys_at[None, :]
    total_scores = tl.where(queries_at[:, None] >= keys_at[None, :], total_scores, 0.0)
    tl.store(grad_scores + offsets, total_scores.to(grad_scores.dtype.element_ty))


@triton.jit(do_not_specialize=["num_chunks"])
def group_grads_kernel(
    x, grad, B, C, query, key, total, step, query_low, key_low, total_low, chunks,
    before, after, grad_scores,
    grad_B, grad_C, rising, overlap, products, num_heads, heads_per_group, num_chunks,
    SPLITS: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Of one chunk, one group and COLUMNS of its state's: the gradients of B and C.

    rising [slots, C, h, Q]: what states before the chunk make of rising; overlap [slots, C, h]: state before times
    gradient after; a slot for each COLUMNS. products [C, h, Q]: x . grad, the same from every slot.
    """
    slot, group, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = slot * COLUMNS
    entry = chunks + chunk * CHUNK_COLUMNS
    first, length = tl.load(entry), tl.load(entry + 1)
    rows = tl.arange(0, Q)
    num_groups = num_heads // heads_per_group
    queries = C.load([first, group * N + start])
    keys = B.load([first, group * N + start])
    sum_B = tl.zeros((Q, COLUMNS), tl.float32)
    sum_C = tl.zeros((Q, COLUMNS), tl.float32)
    for split in tl.static_range(SPLITS):
        places = (split + SPLITS * (chunk * num_groups + group)).to(tl.int64) * (Q * Q)
        scores = tl.load(grad_scores + places + rows[:, None] * Q + rows[None, :])
        sum_C = tl.dot(scores, keys, sum_C, input_precision="ieee")
        sum_B = tl.dot(tl.trans(scores), queries, sum_B, input_precision="ieee")
    for i in range(heads_per_group):
        head = group * heads_per_group + i
        row = chunk * num_heads + head
        at = row * Q
        out = slot * num_chunks * num_heads + row
        state, grad_state = before.load([row * P, start]), after.load([row * P, start])
        tl.store(overlap + out, tl.sum(state.to(tl.float32) * grad_state.to(tl.float32)))
        wide = grad.load([first, head * P]).to(tl.float32)
        values = x.load([first, head * P]).to(tl.float32)
        tl.store(products + at + rows, tl.sum(values * wide, 1))
        wide *= tl.exp2(tl.load(query + at + rows))[:, None]
        from_state = tl.dot(queries, tl.trans(state), input_precision="ieee")
        tl.store(rising + out * Q + rows, tl.sum(from_state * wide, 1))
        sum_C = tl.dot(wide.to(state.dtype), state, sum_C, input_precision="ieee")
        to_end = decays_to_end(key, total, key_low, total_low, row, at, 0, Q, EXACT)
        weighted = values * to_end[:, None]
        sum_B = tl.dot(weighted.to(state.dtype), grad_state, sum_B, input_precision="ieee")
    store_rows(grad_B, sum_B, first, length, num_groups * N, group * N + start, Q, COLUMNS)
    store_rows(grad_C, sum_C, first, length, num_groups * N, group * N + start, Q, COLUMNS)


@triton.jit(do_not_specialize=["num_chunks"])
def step_grads_kernel(
    dt, dt_bias, A_log, total, chunks, own_scores, rising, falling, overlap, products,
    grad_dt, grad_bias, grad_A_log, grad_D, low, high, num_heads, heads_per_group, num_chunks, dt_stride,
    PAIRS: tl.constexpr, STATES: tl.constexpr, Q: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Of one chunk and H heads: the gradient of dt, and the chunk's share of those of dt_bias, A_log and D, [C, h].

    rising [PAIRS + STATES, C, h, Q]: parts of what pairs, then parts of what states make of it.
    """
    chunk, heads, rows = tl.program_id(0), tl.program_id(1) * H + tl.arange(0, H), tl.arange(0, Q)
    first, length = tl.load(chunks + chunk * CHUNK_COLUMNS), tl.load(chunks + chunk * CHUNK_COLUMNS + 1)
    present = heads < num_heads
    inside = (rows[:, None] < length) & present[None, :]
    offsets = (first + rows).to(tl.int64)[:, None] * dt_stride + heads[None, :]
    value = tl.load(dt + offsets, mask=inside, other=0.0)
    bias = tl.load(dt_bias + heads, mask=present, other=0.0)
    rate = tl.load(A_log + heads, mask=present, other=0.0)
    raw, raw_step, step, _ = step_and_log_decay(value, bias[None, :], rate[None, :], low, high)
    row = (chunk * num_heads + heads).to(tl.int64)
    at = row[None, :] * Q + rows[:, None]
    skip = num_chunks * num_heads
    pairs_down = tl.load(falling + at, mask=inside, other=0.0)
    states_down = tl.load(falling + skip.to(tl.int64) * Q + at, mask=inside, other=0.0)
    own = tl.load(products + at, mask=inside, other=0.0)
    tl.store(grad_D + row, tl.sum(own, 0), mask=present)
    group_row = chunk * (num_heads // heads_per_group) + heads // heads_per_group
    own *= tl.load(own_scores + group_row[None, :] * Q + rows[:, None], mask=inside, other=0.0)
    pairs_up, states_up = tl.zeros((Q, H), tl.float32), tl.zeros((Q, H), tl.float32)
    product = tl.zeros((H,), tl.float32)
    for slot in tl.static_range(PAIRS):
        pairs_up += tl.load(rising + (slot * skip + row)[None, :] * Q + rows[:, None], mask=inside, other=0.0)
    for slot in tl.static_range(STATES):
        states_up += tl.load(
            rising + ((PAIRS + slot) * skip + row)[None, :] * Q + rows[:, None], mask=inside, other=0.0
        )
        product += tl.load(overlap + slot * skip + row, mask=present, other=0.0)
    product *= tl.exp2(tl.load(total + row, mask=present, other=0.0))
    # A token's decay acts on what is queried from it on, what keys before it hand on and what goes through the chunk.
    # Sums from a token on are the whole minus those before it, exact enough in fp64.
    earlier = states_down.to(tl.float64)
    upward = pairs_up.to(tl.float64) - pairs_down.to(tl.float64) + states_up.to(tl.float64)
    later = tl.sum(upward, 0)[None, :] + product.to(tl.float64)[None, :]
    later += tl.cumsum(earlier - upward, 0) - earlier + upward
    rate_now = -tl.exp(rate.to(tl.float64))[None, :]
    grad_step = tl.where(step > 0, (pairs_down + states_down) / tl.maximum(step, 1e-300), 0.0)
    grad_step += own + later * rate_now
    allowed = (raw_step >= low) & (raw_step <= high) & inside
    grad = tl.where(allowed, grad_step / (1 + tl.exp(-raw)), 0.0)
    out = (first + rows).to(tl.int64)[:, None] * num_heads + heads[None, :]
    tl.store(grad_dt + out, grad.to(tl.float32).to(grad_dt.dtype.element_ty), mask=inside)
    tl.store(grad_bias + row, tl.sum(grad, 0).to(tl.float32), mask=present)
    share = tl.sum(tl.where(inside, later * rate_now * step, 0.0), 0)
    tl.store(grad_A_log + row, share.to(tl.float32), mask=present)


class Slots(NamedTuple):
    """Sums in parts, fp32: for each of s runs of a chunk's keys, for each of r runs of a state's columns."""

    rising: Tensor  # [s + r, C, h, Q]
    overlap: Tensor  # [r, C, h] state before the chunk times gradient of the state after it

    @staticmethod
    def empty(tables: ScanTables, shape: Shape, device: torch.device) -> "Slots":
        s, r = shape.Q // keys_per_program(shape), shape.state // columns_per_program(shape)
        rows = (tables.num_chunks, shape.num_heads)
        rising = torch.empty(s + r, *rows, shape.Q, dtype=torch.float32, device=device)
        return Slots(rising, torch.empty(r, *rows, dtype=torch.float32, device=device))


def keys_per_program(shape: Shape) -> int:
    """Half a chunk of 128: with all keys what is per pair does not fit in registers (563 spills)."""
    return min(shape.Q, 64)


def columns_per_program(shape: Shape) -> int:
    return min(shape.state, 64)


def launch_inner_grads(
    x: Tensor,
    grad: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    decays: Decays,
    states: Tensor,
    tables: ScanTables,
    shape: Shape,
    slots: Slots,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_x, grad_scores [C, g, splits, Q, Q] in x.dtype, own_scores [C, g, Q], falling [2, C, h, Q]."""
    keys = keys_per_program(shape)
    heads = heads_per_program(shape, len(x), 256)
    splits = shape.heads_per_group // heads
    groups = shape.num_heads // shape.heads_per_group
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_scores = torch.empty(tables.num_chunks, groups, splits, shape.Q, shape.Q, dtype=x.dtype, device=x.device)
    own_scores = torch.empty(tables.num_chunks, groups, shape.Q, dtype=torch.float32, device=x.device)
    falling = torch.empty(2, *decays.query.shape, dtype=torch.float32, device=x.device)
    inner_grads_kernel[shape.Q // keys, shape.num_heads // heads, tables.num_chunks](
        tiles(x, keys, shape.head_dim), tiles(grad, shape.Q, shape.head_dim), grad,
        tiles(B, keys, shape.state), tiles(C, shape.Q, shape.state), tiles(C, keys, shape.state),
        decays.total if D is None else D, *decays, tables.chunks, state_tiles(states, shape.state),
        grad_x, grad_scores, own_scores, slots.rising, falling,
        shape.num_heads, shape.heads_per_group, tables.num_chunks, grad.stride(0),
        HEADS=heads, SPLITS=splits, **shape.blocks, R=keys, SKIP=D is not None, EXACT=shape.exact, **shape.options,
    )  # fmt: skip
    return grad_x, grad_scores, own_scores, falling


def launch_group_grads(
    x: Tensor,
    grad: Tensor,
    B: Tensor,
    C: Tensor,
    decays: Decays,
    before: Tensor,
    after: Tensor,
    grad_scores: Tensor,
    tables: ScanTables,
    shape: Shape,
    slots: Slots,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_B, grad_C, products [C, h, Q]: x . grad of each token."""
    count, columns = len(slots.overlap), columns_per_program(shape)
    grad_B, grad_C = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (B, C))
    products = torch.empty_like(decays.query)
    group_grads_kernel[count, shape.num_heads // shape.heads_per_group, tables.num_chunks](
        *(tiles(y, shape.Q, shape.head_dim) for y in (x, grad)), *(tiles(y, shape.Q, columns) for y in (B, C)),
        *decays, tables.chunks, state_tiles(before, columns), state_tiles(after, columns),
        grad_scores, grad_B, grad_C, slots.rising[-count:], slots.overlap, products,
        shape.num_heads, shape.heads_per_group, tables.num_chunks,
        SPLITS=grad_scores.shape[2], **shape.blocks, COLUMNS=columns,
        EXACT=shape.exact, **shape.options,
    )  # fmt: skip
    return grad_B, grad_C, products


def launch_step_grads(
    dt: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    decays: Decays,
    own_scores: Tensor,
    falling: Tensor,
    products: Tensor,
    slots: Slots,
    tables: ScanTables,
    limit: tuple[float, float],
    shape: Shape,
) -> tuple[Tensor, Tensor]:
    """grad_dt, and the chunks' shares [3, C, h] of the gradients of dt_bias, A_log and D."""
    grad_dt = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
    shares = torch.empty(3, tables.num_chunks, shape.num_heads, dtype=torch.float32, device=dt.device)
    block = min(8, triton.next_power_of_2(shape.num_heads))
    step_grads_kernel[tables.num_chunks, triton.cdiv(shape.num_heads, block)](
        dt, dt_bias, A_log, decays.total, tables.chunks, own_scores, slots.rising, falling, slots.overlap, products,
        grad_dt, *shares, *limit, shape.num_heads, shape.heads_per_group, tables.num_chunks, dt.stride(0),
        PAIRS=len(slots.rising) - len(slots.overlap), STATES=len(slots.overlap), Q=shape.Q, H=block, num_warps=4,
    )  # fmt: skip
    return grad_dt, shares
