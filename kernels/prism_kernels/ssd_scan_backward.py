"""The Mamba-2 scan's backward kernels: within chunks (x, D, C_i . B_j), with states (B, C), and the step sizes.

`rising_i` is the gradient of the cumulated log decay at i as a query, `falling_j` minus that as a key. Rising is a row
sum of M_ij (g_i . x_j) with M rounded as the products round it; falling is x_j . (sum_i M_ij g_i), read off the grad
of x before it is rounded: so what cancels in the sum of their differences cancels to fp32.
"""

# t packed tokens, h heads, p head_dim, g groups, n state, C chunks, Q tokens in a chunk, s splits of a group's heads

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.boundaries import ScanTables
from prism_kernels.ssd_scan_forward import (
    CHUNK_COLUMNS,
    Decays,
    Shape,
    States,
    heads_per_program,
    load_rows,
    load_state,
    pair_decays,
    step_and_log_decay,
    store_rows,
)


@triton.jit
def decays_to_end(query, key, query_low, key_low, at, Q: tl.constexpr, EXACT: tl.constexpr):
    """[Q] dt_j * decay from j to the chunk's end."""
    rows = tl.arange(0, Q)
    gap = tl.load(query + at + Q - 1) - tl.load(key + at + rows)
    if EXACT:
        gap += tl.load(query_low + at + Q - 1) - tl.load(key_low + at + rows)
    return tl.exp2(gap)


@triton.jit
def inner_grads_kernel(
    x, grad, B, C, D, query, key, query_low, key_low, chunks, local, carries, logs,
    grad_x, grad_scores, rising, falling, handed_on, grad_D, num_heads, heads_per_group,
    x_stride, grad_stride, B_stride, C_stride,
    HEADS: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr, STATE: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    SKIP: tl.constexpr, CARRIES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Of one chunk and HEADS heads of one group: the gradients of x, and of C_i . B_j summed over the heads.

    local, carries, logs: gradients of the state after each chunk. handed_on [C, h]: sum of what the states after the
    chunk make of falling; grad_D [C, h]: sums of x . grad.
    """
    program, chunk = tl.program_id(0), tl.program_id(1)
    first_head = program * HEADS
    entry = chunks + chunk * CHUNK_COLUMNS
    first, length, segment, carried = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 4)
    rows = tl.arange(0, Q)
    group = first_head // heads_per_group
    queries = load_rows(C, first, length, C_stride, group * STATE, STATE, Q, N)
    keys = load_rows(B, first, length, B_stride, group * STATE, STATE, Q, N)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    scores = tl.where(rows[:, None] >= rows[None, :], scores, 0.0)
    total_scores = tl.zeros((Q, Q), tl.float32)
    for i in range(HEADS):
        head = first_head + i
        row = chunk * num_heads + head
        at = row.to(tl.int64) * Q
        state = load_state(
            local, carries, logs, chunk, head, segment, carried, num_heads, 0, WIDTH, STATE, P, N, CARRIES
        )
        values = load_rows(x, first, length, x_stride, head * WIDTH, WIDTH, Q, P)
        grads = load_rows(grad, first, length, grad_stride, head * WIDTH, WIDTH, Q, P)
        pairs = tl.dot(grads, tl.trans(values), input_precision="ieee")
        to_end = decays_to_end(query, key, query_low, key_low, at, Q, EXACT)
        out = tl.dot(keys, tl.trans(state), input_precision="ieee") * to_end[:, None]
        tl.store(handed_on + row, tl.sum(out * values.to(tl.float32)))
        decays = pair_decays(query, key, query_low, key_low, at, Q, EXACT)
        total_scores += decays * pairs
        mixing = (decays * scores).to(values.dtype)
        tl.store(rising + at + rows, tl.sum(mixing.to(tl.float32) * pairs, 1))
        out = tl.dot(tl.trans(mixing), grads, out, input_precision="ieee")
        wide = values.to(tl.float32)
        tl.store(falling + at + rows, tl.sum(out * wide, 1))
        if SKIP:
            out += tl.load(D + head).to(tl.float32) * grads.to(tl.float32)
            tl.store(grad_D + row, tl.sum(wide * grads.to(tl.float32)))
        store_rows(grad_x, out, first, length, num_heads * WIDTH, head * WIDTH, WIDTH, Q, P)
    total_scores = tl.where(rows[:, None] >= rows[None, :], total_scores, 0.0)
    split = program % SPLITS + SPLITS * (chunk * (num_heads // heads_per_group) + group)
    offsets = split.to(tl.int64) * (Q * Q) + rows[:, None] * Q + rows[None, :]
    tl.store(grad_scores + offsets, total_scores.to(grad_scores.dtype.element_ty))


@triton.jit
def group_grads_kernel(
    x, grad, B, C, query, key, query_low, key_low, chunks,
    before, before_carries, before_logs, after, after_carries, after_logs, grad_scores,
    grad_B, grad_C, rising, overlap, num_heads, heads_per_group, num_chunks, x_stride, grad_stride, B_stride, C_stride,
    SPLITS: tl.constexpr, WIDTH: tl.constexpr, STATE: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    CARRIES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Of one chunk, one group and N columns of its state: the gradients of B and C.

    rising [slots, C, h, Q]: what states before the chunk make of rising; overlap [slots, C, h]: state before times
    gradient after; a slot for each N columns.
    """
    slot, group, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = slot * N
    entry = chunks + chunk * CHUNK_COLUMNS
    first, length, segment = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    carried_before, carried_after = tl.load(entry + 3), tl.load(entry + 4)
    rows = tl.arange(0, Q)
    num_groups = num_heads // heads_per_group
    queries = load_rows(C, first, length, C_stride, group * STATE + start, STATE - start, Q, N)
    keys = load_rows(B, first, length, B_stride, group * STATE + start, STATE - start, Q, N)
    sum_B = tl.zeros((Q, N), tl.float32)
    sum_C = tl.zeros((Q, N), tl.float32)
    for split in range(SPLITS):
        offsets = (split + SPLITS * (chunk * num_groups + group)).to(tl.int64) * (Q * Q)
        scores = tl.load(grad_scores + offsets + rows[:, None] * Q + rows[None, :])
        sum_C = tl.dot(scores, keys, sum_C, input_precision="ieee")
        sum_B = tl.dot(tl.trans(scores), queries, sum_B, input_precision="ieee")
    for i in range(heads_per_group):
        head = group * heads_per_group + i
        row = chunk * num_heads + head
        at = row.to(tl.int64) * Q
        state = load_state(
            before, before_carries, before_logs, chunk, head, segment, carried_before, num_heads, start,
            WIDTH, STATE, P, N, CARRIES,
        )  # fmt: skip
        grad_state = load_state(
            after, after_carries, after_logs, chunk, head, segment, carried_after, num_heads, start,
            WIDTH, STATE, P, N, CARRIES,
        )  # fmt: skip
        values = load_rows(x, first, length, x_stride, head * WIDTH, WIDTH, Q, P)
        grads = load_rows(grad, first, length, grad_stride, head * WIDTH, WIDTH, Q, P)
        to_end = decays_to_end(query, key, query_low, key_low, at, Q, EXACT)
        wide = grads.to(tl.float32) * tl.exp2(tl.load(query + at + rows))[:, None]
        carried_out = tl.dot(queries, tl.trans(state), input_precision="ieee")
        out = slot * num_chunks * num_heads + row
        tl.store(rising + out.to(tl.int64) * Q + rows, tl.sum(carried_out * wide, 1))
        tl.store(overlap + out, tl.sum(state.to(tl.float32) * grad_state.to(tl.float32)))
        sum_C = tl.dot(wide.to(grads.dtype), state, sum_C, input_precision="ieee")
        weighted = (values.to(tl.float32) * to_end[:, None]).to(values.dtype)
        sum_B = tl.dot(weighted, grad_state, sum_B, input_precision="ieee")
    store_rows(grad_B, sum_B, first, length, num_groups * STATE, group * STATE + start, STATE - start, Q, N)
    store_rows(grad_C, sum_C, first, length, num_groups * STATE, group * STATE + start, STATE - start, Q, N)


@triton.jit
def step_grads_kernel(
    dt, dt_bias, A_log, query, chunks, rising, falling, handed_on, states_rising, overlap,
    grad_dt, grad_bias, grad_A_log, low, high, num_heads, num_chunks, dt_stride,
    SLOTS: tl.constexpr, Q: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Of one chunk and H heads: the gradient of dt, and the chunk's share of those of dt_bias and A_log, [C, h]."""
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
    up = tl.load(rising + at, mask=inside, other=0.0)
    down = tl.load(falling + at, mask=inside, other=0.0)
    product = tl.zeros((H,), tl.float32)
    for slot in range(SLOTS):
        slot_row = slot * num_chunks * num_heads + row
        up += tl.load(states_rising + slot_row[None, :] * Q + rows[:, None], mask=inside, other=0.0)
        product += tl.load(overlap + slot_row, mask=present, other=0.0)
    total = tl.load(query + row * Q + Q - 1, mask=present, other=0.0)
    end = tl.load(handed_on + row, mask=present, other=0.0) + product * tl.exp2(total)
    difference = (up - down).to(tl.float64)
    # sum from each row to the chunk's last, as the whole minus those before it, exact enough in fp64
    later = tl.sum(difference, 0)[None, :] - tl.cumsum(difference, 0) + difference + end.to(tl.float64)[None, :]
    rate_now = -tl.exp(rate.to(tl.float64))[None, :]
    grad_step = tl.where(step > 0, down / tl.maximum(step, 1e-300), 0.0) + later * rate_now
    allowed = (raw_step >= low) & (raw_step <= high) & inside
    grad = tl.where(allowed, grad_step / (1 + tl.exp(-raw)), 0.0)
    out = (first + rows).to(tl.int64)[:, None] * num_heads + heads[None, :]
    tl.store(grad_dt + out, grad.to(tl.float32).to(grad_dt.dtype.element_ty), mask=inside)
    tl.store(grad_bias + row, tl.sum(grad, 0).to(tl.float32), mask=present)
    share = tl.sum(tl.where(inside, later * rate_now * step, 0.0), 0)
    tl.store(grad_A_log + row, share.to(tl.float32), mask=present)


def launch_inner_grads(
    x: Tensor,
    grad: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    decays: Decays,
    states: States,
    tables: ScanTables,
    shape: Shape,
    grad_D: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_x, grad_scores [C, g, s, Q, Q] in x.dtype, rising and falling [C, h, Q], handed_on [C, h]."""
    heads = heads_per_program(shape, tables.num_chunks, 256)
    splits = shape.heads_per_group // heads
    groups = shape.num_heads // shape.heads_per_group
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_scores = torch.empty(tables.num_chunks, groups, splits, shape.Q, shape.Q, dtype=x.dtype, device=x.device)
    rising, falling = torch.empty(2, *decays.query.shape, dtype=torch.float32, device=x.device)
    handed_on = torch.empty(decays.query.shape[:2], dtype=torch.float32, device=x.device)
    inner_grads_kernel[shape.num_heads // heads, tables.num_chunks](
        x, grad, B, C, x if D is None else D, *decays, tables.chunks, *states,
        grad_x, grad_scores, rising, falling, handed_on, grad_D, shape.num_heads, shape.heads_per_group,
        x.stride(0), grad.stride(0), B.stride(0), C.stride(0),
        HEADS=heads, SPLITS=splits, WIDTH=shape.head_dim, STATE=shape.state, Q=shape.Q, P=shape.P, N=shape.N,
        SKIP=D is not None, CARRIES=tables.carries, EXACT=shape.exact,
        num_warps=8 if shape.Q == 128 else 4, num_stages=1 if shape.exact else 2,
    )  # fmt: skip
    return grad_x, grad_scores, rising, falling, handed_on


def launch_group_grads(
    x: Tensor,
    grad: Tensor,
    B: Tensor,
    C: Tensor,
    decays: Decays,
    before: States,
    after: States,
    grad_scores: Tensor,
    tables: ScanTables,
    shape: Shape,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_B, grad_C, rising [slots, C, h, Q], overlap [slots, C, h]."""
    block = min(shape.N, 64)
    slots = triton.cdiv(shape.state, block)
    grad_B, grad_C = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (B, C))
    rising = torch.empty(slots, *decays.query.shape, dtype=torch.float32, device=x.device)
    overlap = torch.empty(rising.shape[:3], dtype=torch.float32, device=x.device)
    group_grads_kernel[slots, shape.num_heads // shape.heads_per_group, tables.num_chunks](
        x, grad, B, C, *decays, tables.chunks, *before, *after, grad_scores,
        grad_B, grad_C, rising, overlap, shape.num_heads, shape.heads_per_group, tables.num_chunks,
        x.stride(0), grad.stride(0), B.stride(0), C.stride(0),
        SPLITS=grad_scores.shape[2], WIDTH=shape.head_dim, STATE=shape.state, Q=shape.Q, P=shape.P, N=block,
        CARRIES=tables.carries, EXACT=shape.exact,
        num_warps=8 if shape.Q == 128 else 4, num_stages=1 if shape.exact else 2,
    )  # fmt: skip
    return grad_B, grad_C, rising, overlap


def launch_step_grads(
    dt: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    decays: Decays,
    rising: Tensor,
    falling: Tensor,
    handed_on: Tensor,
    states_rising: Tensor,
    overlap: Tensor,
    tables: ScanTables,
    limit: tuple[float, float],
    shape: Shape,
    grad_bias: Tensor,
    grad_A_log: Tensor,
) -> Tensor:
    """grad_dt; writes the chunks' shares [C, h] of the gradients of dt_bias and A_log."""
    grad_dt = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
    block = min(16, triton.next_power_of_2(shape.num_heads))
    step_grads_kernel[tables.num_chunks, triton.cdiv(shape.num_heads, block)](
        dt, dt_bias, A_log, decays.query, tables.chunks, rising, falling, handed_on, states_rising, overlap,
        grad_dt, grad_bias, grad_A_log, *limit, shape.num_heads, tables.num_chunks, dt.stride(0),
        SLOTS=states_rising.shape[0], Q=shape.Q, H=block, num_warps=4,
    )  # fmt: skip
    return grad_dt
