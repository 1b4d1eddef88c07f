"""The Mamba-2 scan's forward kernels: step sizes and decays, states between chunks, outputs within them.

Formulas and letters are reference_scan's: query_i is log2 of the decay from the chunk's start up to and including i,
key_j = query_j - log2 dt_j, so exp2(query_i - key_j) = dt_j * decay from j to i.

The states before each chunk are made by walking over chunks with the state in registers, one program per head, half of
n and segment (a run of chunks); segments make programs where heads are few, and what a segment's predecessors
contribute, its carry, is added where the states are used. So x is read twice and no state is read before its use:
five passes of [t, h, p]-sized memory where separate kernels for chunk states and their passing take seven or more.
"""

# t packed tokens, h heads, p head_dim, g groups, n state, C chunks, Q tokens in a chunk

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.boundaries import ScanTables

CHUNK_COLUMNS = tl.constexpr(5)
SEGMENT_COLUMNS = tl.constexpr(7)


@triton.jit
def step_and_log_decay(dt, dt_bias, A_log, low, high):
    """dt after bias and softplus, before and after its limit, and log2 of each step's decay: all fp64."""
    raw = dt.to(tl.float64) + dt_bias.to(tl.float64)
    small = tl.exp(-tl.abs(raw))
    # log(1 + small) to fp32 accuracy also where 1 + small has no digits of small left
    log1p = tl.where(small < 1e-7, small - 0.5 * small * small, tl.log(1 + small))
    raw_step = tl.maximum(raw, 0.0) + log1p
    step = tl.minimum(tl.maximum(raw_step, low), high)
    return raw, raw_step, step, -step * tl.exp(A_log.to(tl.float64)) * 1.4426950408889634


@triton.jit
def decays_kernel(
    dt, dt_bias, A_log, chunks, query, key, query_low, key_low, low, high, num_heads, dt_stride,
    Q: tl.constexpr, H: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """query and key [C, h, Q] fp32 of one chunk and H heads; EXACT also writes what fp32 rounds off them."""
    chunk, heads, rows = tl.program_id(0), tl.program_id(1) * H + tl.arange(0, H), tl.arange(0, Q)
    first, length = tl.load(chunks + chunk * CHUNK_COLUMNS), tl.load(chunks + chunk * CHUNK_COLUMNS + 1)
    inside = (rows[:, None] < length) & (heads[None, :] < num_heads)
    offsets = (first + rows).to(tl.int64)[:, None] * dt_stride + heads[None, :]
    value = tl.load(dt + offsets, mask=inside, other=0.0)
    bias = tl.load(dt_bias + heads, mask=heads < num_heads, other=0.0)
    rate = tl.load(A_log + heads, mask=heads < num_heads, other=0.0)
    _, _, step, log_decay = step_and_log_decay(value, bias[None, :], rate[None, :], low, high)
    step = tl.where(inside, step, 0.0)
    exact_query = tl.cumsum(tl.where(inside, log_decay, 0.0), 0)
    exact_key = exact_query - tl.log2(tl.maximum(step, 1e-300))
    out = (chunk * num_heads + heads[None, :]).to(tl.int64) * Q + rows[:, None]
    mask = (heads < num_heads)[None, :] & (rows >= 0)[:, None]
    high_query = exact_query.to(tl.float32)
    high_key = tl.where(step > 0, exact_key, float("inf")).to(tl.float32)
    tl.store(query + out, high_query, mask=mask)
    tl.store(key + out, high_key, mask=mask)
    if EXACT:
        tl.store(query_low + out, (exact_query - high_query.to(tl.float64)).to(tl.float32), mask=mask)
        rest = tl.where(step > 0, exact_key - exact_key.to(tl.float32).to(tl.float64), 0.0)
        tl.store(key_low + out, rest.to(tl.float32), mask=mask)


@triton.jit
def pair_decays(query, key, query_low, key_low, at, start, Q: tl.constexpr, R: tl.constexpr, EXACT: tl.constexpr):
    """[Q, R] dt_j * decay from j to i, for R keys from `start` on; right where j <= i, elsewhere finite.

    at: first element of the chunk and head in [C, h, Q]. No exponent above that of the diagonal is ever formed.
    """
    i, j = tl.arange(0, Q), start + tl.arange(0, R)
    key_j = tl.load(key + at + j)
    gap = tl.load(query + at + i)[:, None] - key_j[None, :]
    most = tl.load(query + at + j) - key_j
    if EXACT:
        key_low_j = tl.load(key_low + at + j)
        gap += tl.load(query_low + at + i)[:, None] - key_low_j[None, :]
        most += tl.load(query_low + at + j) - key_low_j
    return tl.exp2(tl.minimum(gap, most[None, :]))


@triton.jit
def load_rows(x, first, length, stride, start, width, Q: tl.constexpr, BLOCK: tl.constexpr):
    """[Q, BLOCK] of x [t, .] from row `first` and column `start`; zeros from row `length` and column `width` on."""
    rows, columns = tl.arange(0, Q), tl.arange(0, BLOCK)
    base = x + first.to(tl.int64) * stride + start
    offsets = rows[:, None] * stride + columns[None, :]
    return tl.load(base + offsets, mask=(rows < length)[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def store_rows(x, values, first, length, stride, start, width, Q: tl.constexpr, BLOCK: tl.constexpr):
    """What `load_rows` loads, stored in x's dtype."""
    rows, columns = tl.arange(0, Q), tl.arange(0, BLOCK)
    base = x + first.to(tl.int64) * stride + start
    offsets = rows[:, None] * stride + columns[None, :]
    mask = (rows < length)[:, None] & (columns < width)[None, :]
    tl.store(base + offsets, values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_block(states, row, start, WIDTH: tl.constexpr, STATE: tl.constexpr, P: tl.constexpr, N: tl.constexpr, keep):
    """[P, N] of state `row` of a [., p, n] tensor, from column `start`; zeros where it ends, and where `keep` is 0."""
    p, n = tl.arange(0, P), tl.arange(0, N)
    base = states + row.to(tl.int64) * (WIDTH * STATE) + start
    mask = (p < WIDTH)[:, None] & (n < STATE - start)[None, :] & (keep != 0)
    return tl.load(base + p[:, None] * STATE + n[None, :], mask=mask, other=0.0)


@triton.jit
def store_block(states, values, row, start, WIDTH: tl.constexpr, STATE: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    """What `load_block` loads, stored in the states' dtype."""
    p, n = tl.arange(0, P), tl.arange(0, N)
    base = states + row.to(tl.int64) * (WIDTH * STATE) + start
    mask = (p < WIDTH)[:, None] & (n < STATE - start)[None, :]
    tl.store(base + p[:, None] * STATE + n[None, :], values.to(states.dtype.element_ty), mask=mask)


@triton.jit
def load_state(
    local, carries, logs, chunk, head, segment, carried, num_heads, start,
    WIDTH: tl.constexpr, STATE: tl.constexpr, P: tl.constexpr, N: tl.constexpr, CARRIES: tl.constexpr,
):  # fmt: skip
    """[P, N] state of one chunk and head: what its own segment gives and, where there is one, the carry's share."""
    state = load_block(local, chunk * num_heads + head, start, WIDTH, STATE, P, N, 1)
    if CARRIES:
        carry = load_block(carries, segment * num_heads + head, start, WIDTH, STATE, P, N, carried)
        share = tl.exp2(tl.load(logs + chunk * num_heads + head))
        state = (state.to(tl.float32) + share * carry.to(tl.float32)).to(local.dtype.element_ty)
    return state


@triton.jit
def states_kernel(
    x, B, query, key, query_low, key_low, segments, start_states, local, logs, ends, end_logs,
    num_heads, heads_per_group, x_stride, B_stride,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, STATE: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BACKWARD: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr, BY_DOCUMENT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One segment, one head, N of the state's columns: the states before each chunk from the segment's start on.

    Forward: S <- decay S + (x to_end)^T B, `local` is S before each chunk. BACKWARD walks from the last chunk to the
    first: x is the gradient of y and B is C, S <- decay S + (x from_start)^T B is the gradient of the state before the
    chunk, `local` that after it. start_states [documents, h, p, n] begins a document (STARTS). Written with ENDS: the
    segment's last state, [segments, h, p, n], or [documents, h, p, n] where each document is one segment.
    """
    head, start, segment = tl.program_id(0), tl.program_id(1) * N, tl.program_id(2)
    entry = segments + segment * SEGMENT_COLUMNS
    first_chunk, num_chunks = tl.load(entry), tl.load(entry + 1)
    first_token, end_token, document = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    state = tl.zeros((P, N), tl.float32)
    if STARTS:
        begins = tl.load(entry + 6) if BACKWARD else tl.load(entry + 5)
        row = document * num_heads + head
        state = load_block(start_states, row, start, WIDTH, STATE, P, N, begins).to(tl.float32)
    log = 0.0
    rows = tl.arange(0, Q)
    group = head // heads_per_group
    for step in range(num_chunks):
        i = num_chunks - 1 - step if BACKWARD else step
        chunk = (first_chunk + i) * num_heads + head
        store_block(local, state, chunk, start, WIDTH, STATE, P, N)
        tl.store(logs + chunk, log)
        first = first_token + i * CHUNK
        length = tl.minimum(end_token - first, CHUNK)
        values = load_rows(x, first, length, x_stride, head * WIDTH, WIDTH, Q, P)
        inputs = load_rows(B, first, length, B_stride, group * STATE + start, STATE - start, Q, N)
        at = chunk.to(tl.int64) * Q
        total = tl.load(query + at + Q - 1)
        if BACKWARD:
            gap = tl.load(query + at + rows)
        else:
            gap = total - tl.load(key + at + rows)
            if EXACT:
                gap += tl.load(query_low + at + Q - 1) - tl.load(key_low + at + rows)
        weighted = (values.to(tl.float32) * tl.exp2(gap)[:, None]).to(values.dtype)
        state = tl.dot(tl.trans(weighted), inputs, state * tl.exp2(total), input_precision="ieee")
        log += total
    tl.store(end_logs + segment * num_heads + head, log)
    if ENDS:
        row = document if BY_DOCUMENT else segment
        store_block(ends, state, row * num_heads + head, start, WIDTH, STATE, P, N)


@triton.jit
def carries_kernel(
    documents, ends, end_logs, carries, finals, num_heads, size,
    BLOCK: tl.constexpr, BACKWARD: tl.constexpr, FINALS: tl.constexpr,
):  # fmt: skip
    """One document, one head, BLOCK of the p * n elements: what reaches each of its segments from those before it.

    BACKWARD: from those after it. finals [documents, h, p, n]: the state after the last of them.
    """
    head, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    document = tl.load(documents + tl.program_id(2) * 3)
    first, end = tl.load(documents + tl.program_id(2) * 3 + 1), tl.load(documents + tl.program_id(2) * 3 + 2)
    mask = columns < size
    state = tl.zeros((BLOCK,), tl.float32)
    for step in range(end - first):
        segment = end - 1 - step if BACKWARD else first + step
        row = segment * num_heads + head
        offsets = row.to(tl.int64) * size + columns
        tl.store(carries + offsets, state.to(carries.dtype.element_ty), mask=mask)
        state = state * tl.exp2(tl.load(end_logs + row)) + tl.load(ends + offsets, mask=mask, other=0.0)
    if FINALS:
        offsets = (document * num_heads + head).to(tl.int64) * size + columns
        tl.store(finals + offsets, state, mask=mask)


@triton.jit
def outputs_kernel(
    x, B, C, D, query, key, query_low, key_low, chunks, local, carries, logs, y,
    num_heads, heads_per_group, x_stride, B_stride, C_stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, STATE: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    SKIP: tl.constexpr, CARRIES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y of one chunk and HEADS heads of one group, which share C_i . B_j, computed once and kept in registers."""
    first_head, chunk = tl.program_id(0) * HEADS, tl.program_id(1)
    entry = chunks + chunk * CHUNK_COLUMNS
    first, length, segment, carried = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    rows = tl.arange(0, Q)
    group = first_head // heads_per_group
    queries = load_rows(C, first, length, C_stride, group * STATE, STATE, Q, N)
    keys = load_rows(B, first, length, B_stride, group * STATE, STATE, Q, N)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    scores = tl.where(rows[:, None] >= rows[None, :], scores, 0.0)
    for i in range(HEADS):
        head = first_head + i
        at = (chunk * num_heads + head).to(tl.int64) * Q
        state = load_state(
            local, carries, logs, chunk, head, segment, carried, num_heads, 0, WIDTH, STATE, P, N, CARRIES
        )
        values = load_rows(x, first, length, x_stride, head * WIDTH, WIDTH, Q, P)
        from_start = tl.exp2(tl.load(query + at + rows))
        out = tl.dot(queries, tl.trans(state), input_precision="ieee") * from_start[:, None]
        mixing = scores * pair_decays(query, key, query_low, key_low, at, 0, Q, Q, EXACT)
        out = tl.dot(mixing.to(values.dtype), values, out, input_precision="ieee")
        if SKIP:
            out += tl.load(D + head).to(tl.float32) * values.to(tl.float32)
        store_rows(y, out, first, length, num_heads * WIDTH, head * WIDTH, WIDTH, Q, P)


class Decays(NamedTuple):
    """Cumulated log2 decays on the chunk grid, each [C, h, Q] fp32; the low ones what fp32 rounds off (fp32 x only)."""

    query: Tensor
    key: Tensor
    query_low: Tensor
    key_low: Tensor


class States(NamedTuple):
    """States before each chunk, or their gradients after each chunk, as `load_state` puts them together."""

    local: Tensor  # [C, h, p, n] in x.dtype, from the chunk's own segment
    carries: Tensor  # [segments, h, p, n] in x.dtype; `local` where no document has more than one segment
    logs: Tensor  # [C, h] fp32, log2 of the carry's decay


class Shape(NamedTuple):
    """The sizes every kernel of one scan agrees on."""

    num_heads: int
    heads_per_group: int
    head_dim: int
    state: int
    chunk_len: int
    Q: int  # power of two >= chunk_len; likewise P and N
    P: int
    N: int
    dtype: torch.dtype

    @staticmethod
    def of(x: Tensor, B: Tensor, chunk_len: int) -> "Shape":
        heads, width, state = x.shape[1], x.shape[2], B.shape[2]
        q, p, n = (max(16, triton.next_power_of_2(size)) for size in (chunk_len, width, state))
        return Shape(heads, heads // B.shape[1], width, state, chunk_len, q, p, n, x.dtype)

    @property
    def exact(self) -> bool:
        return self.dtype == torch.float32


def heads_per_program(shape: Shape, num_chunks: int, programs: int) -> int:
    """As many heads of a group as leave `programs` programs: they share C_i . B_j. A divisor of h / g."""
    most = max(1, num_chunks * shape.num_heads // programs)
    return max(k for k in range(1, shape.heads_per_group + 1) if shape.heads_per_group % k == 0 and k <= most)


def launch_decays(
    dt: Tensor, dt_bias: Tensor, A_log: Tensor, tables: ScanTables, limit: tuple[float, float], shape: Shape
) -> Decays:
    arrays = torch.empty(
        4 if shape.exact else 2, tables.num_chunks, shape.num_heads, shape.Q, dtype=torch.float32, device=dt.device
    )
    query, key, query_low, key_low = (*arrays, *arrays) if not shape.exact else arrays
    block = min(16, triton.next_power_of_2(shape.num_heads))
    decays_kernel[tables.num_chunks, triton.cdiv(shape.num_heads, block)](
        dt, dt_bias, A_log, tables.chunks, query, key, query_low, key_low, *limit, shape.num_heads, dt.stride(0),
        Q=shape.Q, H=block, EXACT=shape.exact, num_warps=4,
    )  # fmt: skip
    return Decays(query, key, query_low, key_low)


def launch_states(
    x: Tensor,
    B: Tensor,
    decays: Decays,
    tables: ScanTables,
    shape: Shape,
    start: Tensor | None,
    want_end: bool,
    num_documents: int,
    backward: bool = False,
) -> tuple[States, Tensor | None]:
    """States before each chunk (backward: gradients after each), and those at the documents' ends (their starts).

    start: [documents, h, p, n] or None. An empty document ends as it starts.
    """
    sizes, device = (shape.num_heads, shape.head_dim, shape.state), x.device
    local = torch.empty(tables.num_chunks, *sizes, dtype=x.dtype, device=device)
    logs = torch.empty(tables.num_chunks, shape.num_heads, dtype=torch.float32, device=device)
    end_logs = torch.empty(tables.num_segments, shape.num_heads, dtype=torch.float32, device=device)
    finals = None
    if want_end:
        finals = torch.zeros(num_documents, *sizes, dtype=torch.float32, device=device)
        if start is not None:
            finals.copy_(start)
    ends = finals
    if tables.carries:
        ends = torch.empty(tables.num_segments, *sizes, dtype=torch.float32, device=device)
    block = min(shape.N, 64)
    states_kernel[shape.num_heads, triton.cdiv(shape.state, block), tables.num_segments](
        x, B, decays.query, decays.key, decays.query_low, decays.key_low, tables.segments,
        x if start is None else start, local, logs, logs if ends is None else ends, end_logs,
        shape.num_heads, shape.heads_per_group, x.stride(0), B.stride(0),
        CHUNK=shape.chunk_len, WIDTH=shape.head_dim, STATE=shape.state, Q=shape.Q, P=shape.P, N=block,
        BACKWARD=backward, STARTS=start is not None, ENDS=ends is not None, BY_DOCUMENT=not tables.carries,
        EXACT=shape.exact, num_warps=4, num_stages=1 if shape.exact else 3,
    )  # fmt: skip
    carries = local
    if tables.carries:
        assert ends is not None
        carries = torch.empty(tables.num_segments, *sizes, dtype=x.dtype, device=device)
        size = shape.head_dim * shape.state
        block = min(2048, triton.next_power_of_2(size))
        carries_kernel[shape.num_heads, triton.cdiv(size, block), len(tables.documents)](
            tables.documents, ends, end_logs, carries, ends if finals is None else finals, shape.num_heads, size,
            BLOCK=block, BACKWARD=backward, FINALS=finals is not None, num_warps=4,
        )  # fmt: skip
    return States(local, carries, logs), finals


def launch_outputs(
    x: Tensor, B: Tensor, C: Tensor, D: Tensor | None, decays: Decays, states: States, tables: ScanTables, shape: Shape
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    heads = heads_per_program(shape, tables.num_chunks, 512)
    outputs_kernel[shape.num_heads // heads, tables.num_chunks](
        x, B, C, x if D is None else D, *decays, tables.chunks, *states, y,
        shape.num_heads, shape.heads_per_group, x.stride(0), B.stride(0), C.stride(0),
        HEADS=heads, WIDTH=shape.head_dim, STATE=shape.state, Q=shape.Q, P=shape.P, N=shape.N,
        SKIP=D is not None, CARRIES=tables.carries, EXACT=shape.exact,
        num_warps=8 if shape.Q == 128 else 4, num_stages=1 if shape.exact else 2,
    )  # fmt: skip
    return y
