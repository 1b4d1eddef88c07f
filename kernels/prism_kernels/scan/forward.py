"""The Mamba-2 scan's forward kernels: step sizes and decays, states between chunks, outputs within them.

Formulas and letters are reference.py's: query_i is log2 of the decay from the chunk's start up to and including i,
key_j = query_j - log2 dt_j, so exp2(query_i - key_j) = dt_j * decay from j to i.

The states before each chunk are made by walking over chunks with the state in registers, one program per head, half of
n and segment (a run of chunks). Where heads are few, documents have several segments, and what a segment's
predecessors carry to it is added to its states afterwards. So at 128 heads x is read twice, a state written and read
once: five passes of [t, h, p]-sized memory, where separate kernels for chunk states and their passing take seven.
"""

# t packed tokens, h heads, p head_dim, g groups, n state, C chunks, Q tokens in a chunk

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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
    dt, dt_bias, A_log, chunks, query, key, total, step, query_low, key_low, total_low, low, high, num_heads, dt_stride,
    Q: tl.constexpr, H: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """query, key, step [C, h, Q] and total [C, h] of one chunk and H heads; EXACT: also what fp32 rounds off them.

    Rows beyond the chunk's end have query -inf and key inf: what is loaded for them, rows of the next document, gets
    weight 0 in every product.
    """
    chunk, heads, rows = tl.program_id(0), tl.program_id(1) * H + tl.arange(0, H), tl.arange(0, Q)
    first, length = tl.load(chunks + chunk * CHUNK_COLUMNS), tl.load(chunks + chunk * CHUNK_COLUMNS + 1)
    inside = (rows[:, None] < length) & (heads[None, :] < num_heads)
    offsets = (first + rows).to(tl.int64)[:, None] * dt_stride + heads[None, :]
    value = tl.load(dt + offsets, mask=inside, other=0.0)
    bias = tl.load(dt_bias + heads, mask=heads < num_heads, other=0.0)
    rate = tl.load(A_log + heads, mask=heads < num_heads, other=0.0)
    _, _, length_of_step, log_decay = step_and_log_decay(value, bias[None, :], rate[None, :], low, high)
    length_of_step = tl.where(inside, length_of_step, 0.0)
    log_decay = tl.where(inside, log_decay, 0.0)
    exact_query = tl.cumsum(log_decay, 0)
    exact_key = exact_query - tl.log2(tl.maximum(length_of_step, 1e-300))
    exact_total = tl.sum(log_decay, 0)
    row = (chunk * num_heads + heads).to(tl.int64)
    out = row[None, :] * Q + rows[:, None]
    mask = (heads < num_heads)[None, :] & (rows >= 0)[:, None]
    tl.store(query + out, tl.where(inside, exact_query, float("-inf")).to(tl.float32), mask=mask)
    tl.store(key + out, tl.where(length_of_step > 0, exact_key, float("inf")).to(tl.float32), mask=mask)
    tl.store(step + out, length_of_step.to(tl.float32), mask=mask)
    tl.store(total + row, exact_total.to(tl.float32), mask=heads < num_heads)
    if EXACT:
        query_rest = exact_query - exact_query.to(tl.float32).to(tl.float64)
        key_rest = exact_key - exact_key.to(tl.float32).to(tl.float64)
        total_rest = exact_total - exact_total.to(tl.float32).to(tl.float64)
        tl.store(query_low + out, query_rest.to(tl.float32), mask=mask)
        tl.store(key_low + out, tl.where(length_of_step > 0, key_rest, 0.0).to(tl.float32), mask=mask)
        tl.store(total_low + row, total_rest.to(tl.float32), mask=heads < num_heads)


@triton.jit
def pair_decays(query, key, query_low, key_low, at, start, Q: tl.constexpr, R: tl.constexpr, EXACT: tl.constexpr):
    """[Q, R] dt_j * decay from j to i, for R keys from `start` on; right where j <= i, elsewhere at most 2^64.

    at: the chunk and head's first place in [C, h, Q]. Where j <= i it is at most dt_j, far below 2^64; where j > i the
    bound keeps it finite, for the caller to multiply by 0 or to mask.
    """
    i, j = tl.arange(0, Q), start + tl.arange(0, R)
    gap = tl.load(query + at + i)[:, None] - tl.load(key + at + j)[None, :]
    if EXACT:
        gap += tl.load(query_low + at + i)[:, None] - tl.load(key_low + at + j)[None, :]
    return tl.exp2(tl.minimum(gap, 64.0))


@triton.jit
def decays_to_end(key, total, key_low, total_low, row, at, start, R: tl.constexpr, EXACT: tl.constexpr):
    """[R] dt_j * decay from j to the chunk's end, for R keys from `start` on."""
    j = start + tl.arange(0, R)
    gap = tl.load(total + row) - tl.load(key + at + j)
    if EXACT:
        gap += tl.load(total_low + row) - tl.load(key_low + at + j)
    return tl.exp2(gap)


@triton.jit
def load_rows(x, first, length, stride, start, Q: tl.constexpr, BLOCK: tl.constexpr):
    """[Q, BLOCK] of x [t, .] from row `first` and column `start` on; zeros beyond `length` rows."""
    rows, columns = tl.arange(0, Q), tl.arange(0, BLOCK)
    base = x + first.to(tl.int64) * stride + start
    mask = (rows < length)[:, None] & (columns >= 0)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(x, values, first, length, stride, start, Q: tl.constexpr, BLOCK: tl.constexpr):
    """[Q, BLOCK] values to x [t, .] from row `first` and column `start` on, none beyond `length` rows."""
    rows, columns = tl.arange(0, Q), tl.arange(0, BLOCK)
    base = x + first.to(tl.int64) * stride + start
    mask = (rows < length)[:, None] & (columns >= 0)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def state_places(row, start, P: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr):
    """[P, COLUMNS] places of state `row` in a [., P, N] tensor, from column `start` on."""
    p, n = tl.arange(0, P), tl.arange(0, COLUMNS)
    return row.to(tl.int64) * (P * N) + start + p[:, None] * N + n[None, :]


@triton.jit
def states_kernel(
    x, B, query, key, total, step, query_low, key_low, total_low, segments, start_states, states, logs, ends, end_logs,
    num_heads, heads_per_group,
    CHUNK: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr,
    BACKWARD: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr, BY_DOCUMENT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One segment, one head, COLUMNS of the state's: the states before each chunk from the segment's start on.

    Forward: S <- decay S + (x to_end)^T B, `states` is S before each chunk. BACKWARD walks from the last chunk to the
    first: x is the gradient of y and B is C, S <- decay S + (x from_start)^T B is the gradient of the state before the
    chunk, `states` that after it. start_states [documents, h, p, n] begins a document (STARTS). Written with ENDS: the
    segment's last state, [segments, h, p, n], or [documents, h, p, n] where each document is one segment.
    """
    head, start, segment = tl.program_id(0), tl.program_id(1) * COLUMNS, tl.program_id(2)
    entry = segments + segment * SEGMENT_COLUMNS
    first_chunk, num_chunks = tl.load(entry), tl.load(entry + 1)
    first_token, document = tl.load(entry + 2), tl.load(entry + 4)
    state = tl.zeros((P, COLUMNS), tl.float32)
    if STARTS:
        begins = tl.load(entry + 6) if BACKWARD else tl.load(entry + 5)
        places = state_places(document * num_heads + head, start, P, N, COLUMNS)
        state = tl.load(start_states + places, mask=(places >= 0) & (begins != 0), other=0.0).to(tl.float32)
    log = 0.0
    rows = tl.arange(0, Q)
    column = head // heads_per_group * N + start
    for walked in range(num_chunks):
        i = num_chunks - 1 - walked if BACKWARD else walked
        row = (first_chunk + i) * num_heads + head
        at = row * Q
        first = first_token + i * CHUNK
        states.store([row * P, start], state.to(states.dtype))
        tl.store(logs + row, log)
        values = x.load([first, head * P])
        inputs = B.load([first, column])
        if BACKWARD:
            weight = tl.exp2(tl.load(query + at + rows))
        else:
            weight = decays_to_end(key, total, key_low, total_low, row, at, 0, Q, EXACT)
        decay = tl.load(total + row)
        weighted = (values.to(tl.float32) * weight[:, None]).to(values.dtype)
        state = tl.dot(tl.trans(weighted), inputs, state * tl.exp2(decay), input_precision="ieee")
        log += decay
    tl.store(end_logs + segment * num_heads + head, log)
    if ENDS:
        end_row = document if BY_DOCUMENT else segment
        tl.store(ends + state_places(end_row * num_heads + head, start, P, N, COLUMNS), state)


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
    state = tl.zeros((BLOCK,), tl.float32)
    for step in range(end - first):
        segment = end - 1 - step if BACKWARD else first + step
        row = segment * num_heads + head
        offsets = row.to(tl.int64) * size + columns
        tl.store(carries + offsets, state.to(carries.dtype.element_ty))
        state = state * tl.exp2(tl.load(end_logs + row)) + tl.load(ends + offsets)
    if FINALS:
        offsets = (document * num_heads + head).to(tl.int64) * size + columns
        tl.store(finals + offsets, state)


@triton.jit
def add_carries_kernel(
    states, carries, logs, chunks, num_heads, size,
    BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """One chunk, one head, BLOCK of the p * n elements: adds what the chunk's segment was carried to its state."""
    head, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(2)
    entry = chunks + chunk * CHUNK_COLUMNS
    carried = tl.load(entry + 4) if BACKWARD else tl.load(entry + 3)
    if carried != 0:
        row = chunk * num_heads + head
        places = states + row.to(tl.int64) * size + columns
        carry_row = (tl.load(entry + 2) * num_heads + head).to(tl.int64)
        carry = tl.load(carries + carry_row * size + columns)
        state = tl.load(places).to(tl.float32) + tl.exp2(tl.load(logs + row)) * carry
        tl.store(places, state.to(states.dtype.element_ty))


@triton.jit
def outputs_kernel(
    x, B, C, D, query, key, total, step, query_low, key_low, total_low, chunks, states, y,
    num_heads, heads_per_group,
    HEADS: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, SKIP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y of one chunk and HEADS heads of one group, which share C_i . B_j, computed once and kept in registers."""
    first_head, chunk = tl.program_id(0) * HEADS, tl.program_id(1)
    entry = chunks + chunk * CHUNK_COLUMNS
    first, length = tl.load(entry), tl.load(entry + 1)
    rows = tl.arange(0, Q)
    column = first_head // heads_per_group * N
    queries = C.load([first, column])
    scores = tl.dot(queries, tl.trans(B.load([first, column])), input_precision="ieee")
    scores = tl.where(rows[:, None] >= rows[None, :], scores, 0.0)
    for i in range(HEADS):
        head = first_head + i
        row = chunk * num_heads + head
        at = row * Q
        values = x.load([first, head * P])
        from_start = tl.exp2(tl.load(query + at + rows))
        state = states.load([row * P, 0])
        out = tl.dot(queries, tl.trans(state), input_precision="ieee") * from_start[:, None]
        mixing = scores * pair_decays(query, key, query_low, key_low, at, 0, Q, Q, EXACT)
        out = tl.dot(mixing.to(values.dtype), values, out, input_precision="ieee")
        if SKIP:
            out += tl.load(D + head).to(tl.float32) * values.to(tl.float32)
        store_rows(y, out, first, length, num_heads * P, head * P, Q, P)


class Decays(NamedTuple):
    """Steps and cumulated log2 decays on the chunk grid, fp32; for fp32 x the low ones are what fp32 rounds off."""

    query: Tensor  # [C, h, Q]
    key: Tensor  # [C, h, Q]
    total: Tensor  # [C, h] over the chunk
    step: Tensor  # [C, h, Q] dt after bias, softplus and limit; 0 beyond the chunk's end
    query_low: Tensor
    key_low: Tensor
    total_low: Tensor


class Shape(NamedTuple):
    """The sizes every kernel of one scan agrees on. p and n are powers of two, at least 16."""

    num_heads: int
    heads_per_group: int
    head_dim: int
    state: int
    chunk_len: int
    Q: int  # power of two >= chunk_len, at least 16
    dtype: torch.dtype

    @staticmethod
    def of(x: Tensor, B: Tensor, chunk_len: int) -> "Shape":
        heads, q = x.shape[1], max(16, triton.next_power_of_2(chunk_len))
        return Shape(heads, heads // B.shape[1], x.shape[2], B.shape[2], chunk_len, q, x.dtype)

    @property
    def exact(self) -> bool:
        return self.dtype == torch.float32

    @property
    def blocks(self) -> dict[str, int]:
        return {"Q": self.Q, "P": self.head_dim, "N": self.state}

    @property
    def options(self) -> dict[str, int]:
        """Of kernels that work on one chunk: registers allow one program per multiprocessor, so three stages fit.

        Chosen by what they compile to for sm_90 (no spills, at most 182 KB of shared memory); not yet a measurement.
        Heads wider than 64 leave no registers for loads ahead: 10 spills, with two stages 242.
        """
        wide = self.head_dim > 64
        return {"num_warps": 8 if self.Q == 128 or wide else 4, "num_stages": 1 if self.exact or wide else 3}


def tiles(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x [t, k, l], each token's k * l values together, to be copied [rows, columns] at a time by the tensor engine."""
    return TensorDescriptor(x, [x.shape[0], x.shape[1] * x.shape[2]], [x.stride(0), 1], [rows, columns])


def state_tiles(states: Tensor, columns: int) -> TensorDescriptor:
    """states [., h, p, n], contiguous, to be copied [p, columns] at a time."""
    p, n = states.shape[2:]
    return TensorDescriptor(states, [states.shape[0] * states.shape[1] * p, n], [n, 1], [p, columns])


def heads_per_program(shape: Shape, tokens: int, programs: int) -> int:
    """As many heads of a group as leave `programs` programs: they share C_i . B_j. A divisor of h / g.

    By tokens, not by chunks, of which documents make more or fewer each time: kernels are compiled for one number.
    """
    most = max(1, tokens // shape.chunk_len * shape.num_heads // programs)
    return max(k for k in range(1, shape.heads_per_group + 1) if shape.heads_per_group % k == 0 and k <= most)


def launch_decays(
    dt: Tensor, dt_bias: Tensor, A_log: Tensor, tables: ScanTables, limit: tuple[float, float], shape: Shape
) -> Decays:
    copies, rows = 2 if shape.exact else 1, (tables.num_chunks, shape.num_heads)
    arrays = torch.empty(1 + 2 * copies, *rows, shape.Q, dtype=torch.float32, device=dt.device)
    totals = torch.empty(copies, *rows, dtype=torch.float32, device=dt.device)
    decays = Decays(arrays[-2], arrays[-1], totals[-1], arrays[0], arrays[1], arrays[2], totals[0])
    block = min(16, triton.next_power_of_2(shape.num_heads))
    decays_kernel[tables.num_chunks, triton.cdiv(shape.num_heads, block)](
        dt, dt_bias, A_log, tables.chunks, *decays, *limit, shape.num_heads, dt.stride(0),
        Q=shape.Q, H=block, EXACT=shape.exact, num_warps=8,
    )  # fmt: skip
    return decays


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
) -> tuple[Tensor, Tensor | None]:
    """States [C, h, p, n] before each chunk (backward: gradients after it), and at the documents' ends (starts).

    start: [documents, h, p, n] or None. An empty document ends as it starts.
    """
    sizes, device = (shape.num_heads, shape.head_dim, shape.state), x.device
    states = torch.empty(tables.num_chunks, *sizes, dtype=x.dtype, device=device)
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
    columns = min(shape.state, 64)
    states_kernel[shape.num_heads, shape.state // columns, tables.num_segments](
        tiles(x, shape.Q, shape.head_dim), tiles(B, shape.Q, columns), *decays, tables.segments,
        logs if start is None else start, state_tiles(states, columns), logs, logs if ends is None else ends, end_logs,
        shape.num_heads, shape.heads_per_group, CHUNK=shape.chunk_len, **shape.blocks, COLUMNS=columns,
        BACKWARD=backward, STARTS=start is not None, ENDS=ends is not None, BY_DOCUMENT=not tables.carries,
        EXACT=shape.exact, num_warps=4, num_stages=1 if shape.exact else 3,
    )  # fmt: skip
    if tables.carries:
        assert ends is not None
        carries = torch.empty_like(ends)
        size = shape.head_dim * shape.state
        block = min(2048, size)
        carries_kernel[shape.num_heads, size // block, len(tables.documents)](
            tables.documents, ends, end_logs, carries, ends if finals is None else finals, shape.num_heads, size,
            BLOCK=block, BACKWARD=backward, FINALS=finals is not None, num_warps=4,
        )  # fmt: skip
        block = min(8192, size)
        add_carries_kernel[shape.num_heads, size // block, tables.num_chunks](
            states, carries, logs, tables.chunks, shape.num_heads, size,
            BLOCK=block, BACKWARD=backward, num_warps=8,
        )  # fmt: skip
    return states, finals


def launch_outputs(
    x: Tensor, B: Tensor, C: Tensor, D: Tensor | None, decays: Decays, states: Tensor, tables: ScanTables, shape: Shape
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    heads = heads_per_program(shape, len(x), 512)
    outputs_kernel[shape.num_heads // heads, tables.num_chunks](
        tiles(x, shape.Q, shape.head_dim), *(tiles(z, shape.Q, shape.state) for z in (B, C)),
        decays.total if D is None else D, *decays, tables.chunks, state_tiles(states, shape.state), y,
        shape.num_heads, shape.heads_per_group, HEADS=heads, **shape.blocks,
        SKIP=D is not None, EXACT=shape.exact, **shape.options,
    )  # fmt: skip
    return y
