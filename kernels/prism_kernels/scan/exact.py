"""The Mamba-2 scan whose result for a token has the same bits in training and in decoding.

Training computes each chunk of 64 tokens at once. Decoding keeps the state before the chunk and the chunk's tokens, and
computes one row of the same products; the recurrence would add the same numbers in another order. A decode step costs
about as much as the recurrence, which reads and writes the whole state: here it is only read, and written once a chunk.
Notation as in `reference`; decays are differences of sums in fp64, which a running sum equals bit for bit.
"""

# t packed tokens, b rows of a decode step, h heads, p head_dim, g groups, n state, C chunks, Q = 64 tokens in a chunk,
# m = h / g heads in a group

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from prism_kernels.boundaries import Boundaries, ChunkGrid
from prism_kernels.caches import SlotCache
from prism_kernels.linear.exact import bmm
from prism_kernels.precision import accumulate_dtype
from prism_kernels.scan import reference
from prism_kernels.scan.inputs import ScanInputs

CHUNK = 64
LINEAR_FROM = 20.0  # softplus(x) is x to fp32's last bit from here on


def ssd_scan(
    inputs: ScanInputs,
    boundaries: Boundaries,
    chunk_len: int,
    initial_state: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.ssd_scan` in chunks of 64 tokens, whatever chunk_len says; each document starts a new one."""
    inputs.check(boundaries, chunk_len)
    (step, decay), grid = _step_sizes(inputs), boundaries.derive(_grid)
    tensors = (inputs.x, step, decay, inputs.B, inputs.C, inputs.D, initial_state)
    y, final = _Scan.apply(*tensors, boundaries, grid, return_final_states)
    return (y, final) if return_final_states else y


def _grid(boundaries: Boundaries) -> ChunkGrid:
    return ChunkGrid.build(boundaries, CHUNK)


class _Softplus(torch.autograd.Function):
    """log(1 + exp(x)); F.softplus rounds an element by where it lies in memory."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.where(x > LINEAR_FROM, x, x.clamp(max=LINEAR_FROM).exp_().log1p_())

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.sigmoid(ctx.saved_tensors[0])


def _step_sizes(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """dt after bias, softplus and limit, and the log of each step's decay: both [t, h]."""
    acc = accumulate_dtype(inputs.dt.dtype)
    step = _Softplus.apply(inputs.dt.to(acc) + inputs.dt_bias.to(acc))
    if tuple(inputs.dt_limit) != (0.0, math.inf):
        step = step.clamp(*inputs.dt_limit)
    return step, step * -inputs.A_log.to(acc).exp()


class _Chunks(NamedTuple):
    """A scan's inputs on the chunk grid, its decays, and the state before each chunk."""

    x: Tensor  # [C, Q, h, p]
    B: Tensor  # [C * g, Q, n]
    C: Tensor  # [C * g, Q, n]
    query: Tensor  # [C, h, Q] fp64: log of the decay from the chunk's start to i
    key: Tensor  # [C, h, Q] fp64: the same minus log dt_j: exp(query_i - key_j) = dt_j * decay from j to i
    before: Tensor  # [C, g, n, m, p]
    after: Tensor  # [non-empty documents, g, n, m, p]: after each one's last chunk

    @staticmethod
    def build(
        x: Tensor, step: Tensor, decay: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, boundaries: Boundaries
    ) -> "_Chunks":
        grid, groups = boundaries.derive(_grid), B.shape[1]
        x, (B, C) = grid.fill(x), (reference._by_group(grid.fill(y), groups) for y in (B, C))
        query = grid.fill(decay).transpose(1, 2).double().cumsum(2)
        key = query - grid.fill(step).transpose(1, 2).log()
        last = query[..., -1]
        local, total = _added(x, B, last, key), _factors(last, groups, step.dtype)
        before = torch.empty_like(local)
        if initial is None:
            before[grid.first] = 0
        else:
            inward = reference._states_inward(initial.to(before.dtype), groups)
            before[grid.first] = inward[boundaries.document_rows]
        for chunk, previous in grid.steps:
            before[chunk] = before[previous] * total[previous] + local[previous]
        after = before[grid.last] * total[grid.last] + local[grid.last]
        return _Chunks(x, B, C, query, key, before, after)


def _added(x: Tensor, B: Tensor, last: Tensor, key: Tensor) -> Tensor:
    """What chunks add to the state: x [C, Q, h, p], B [C * g, Q, n], last [C, h], key [C, h, Q] -> [C, g, n, m, p]."""
    chunks, _, heads, p = x.shape
    groups = len(B) // chunks
    acc = accumulate_dtype(x.dtype)
    scaled = reference._scale(x, (last[..., None] - key).to(acc).exp_(), groups)
    return bmm(B.transpose(1, 2), scaled).to(acc).reshape(chunks, groups, -1, heads // groups, p)


def _factors(logs: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """exp(logs [C, h]) to multiply states with: [C, g, 1, m, 1]."""
    return logs.to(dtype).exp_().view(len(logs), groups, 1, -1, 1)


class _Scan(reference._ChunkedScan):
    @staticmethod
    def forward(ctx, x, step, decay, B, C, D, initial, boundaries, grid, want_final):
        chunks = _Chunks.build(x, step, decay, B, C, initial, boundaries)
        y = grid.flatten(_outputs(chunks, D))
        final = None
        if want_final:
            shape = (boundaries.num_documents, *x.shape[1:], B.shape[2])
            final = chunks.after.new_zeros(shape) if initial is None else initial.to(chunks.after.dtype, copy=True)
            final[boundaries.document_rows] = reference._states_outward(chunks.after)
        before = chunks.before.flatten(0, 1).flatten(2).to(x.dtype)
        ctx.save_for_backward(x, step, decay, B, C, D, before)
        ctx.boundaries, ctx.grid, ctx.has_initial = boundaries, grid, initial is not None
        ctx.set_materialize_grads(False)
        return y, final


def _outputs(chunks: _Chunks, D: Tensor | None) -> Tensor:
    """[C, Q, h, p] in x.dtype."""
    x, (count, groups, n, m, p) = chunks.x, chunks.before.shape
    acc = chunks.before.dtype
    scores = bmm(chunks.C, chunks.B.transpose(1, 2)).tril_().view(count, groups, 1, CHUNK, CHUNK)
    carried = bmm(chunks.C, chunks.before.to(x.dtype).view(-1, n, m * p)).view(count, groups, CHUNK, m, p)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    size = max(1, reference.BLOCK_ELEMENTS // (groups * m * CHUNK**2))
    for start in range(0, count, size):
        part = slice(start, start + size)
        query, values = chunks.query[part], x[part].transpose(1, 2).contiguous()  # [., h, Q], [., h, Q, p]
        decays = (query[..., None] - chunks.key[part, :, None]).to(acc).tril_().exp_()
        mixing = decays.view(-1, groups, m, CHUNK, CHUNK).mul_(scores[part]).to(x.dtype)
        mixed = bmm(mixing.view(-1, CHUNK, CHUNK), values.flatten(0, 1)).view(-1, groups, m, CHUNK, p)
        since_start = query.to(acc).exp_().view(-1, groups, m, CHUNK, 1)
        out = (carried[part].transpose(2, 3) * since_start).add_(mixed).flatten(1, 2)
        if D is not None:
            out += values * D.to(acc)[:, None, None]
        y[part] = out.transpose(1, 2)
    return y


# ------------------------------------------------------------------------------------------------------------- decoding


@dataclass(frozen=True, eq=False)
class ReplayCache(SlotCache):
    """The state before the chunk a sequence is in, and the chunk's tokens; rows after its last one mean nothing."""

    state: Tensor  # [slots, g, n, m, p] fp32
    rounded: Tensor | None  # the same in the activations' dtype, as products take it; None where that is fp32
    x: Tensor  # [slots, h, Q, p]
    B: Tensor  # [slots, g, Q, n]
    key: Tensor  # [slots, h, Q] fp64, as in `_Chunks`
    query: Tensor  # [slots, h] fp64, at the last token

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.state, self.rounded, self.x, self.B, self.key, self.query) if x is not None]

    def put(self, slots: Tensor, state: Tensor) -> None:
        self.state[slots] = state
        if self.rounded is not None:
            self.rounded[slots] = state.to(self.rounded.dtype)


def ssd_cache(
    slots: int, heads: int, head_dim: int, groups: int, state: int, dtype: torch.dtype, device: torch.device | str
) -> ReplayCache:
    """An empty cache for `slots` sequences of a layer; dtype: the activations'."""

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(slots, *shape, dtype=dtype, device=device)

    shape, acc = (groups, state, heads // groups, head_dim), accumulate_dtype(dtype)
    return ReplayCache(
        state=zeros(*shape, dtype=acc),
        rounded=None if dtype == acc else zeros(*shape, dtype=dtype),
        x=zeros(heads, CHUNK, head_dim, dtype=dtype),
        B=zeros(groups, CHUNK, state, dtype=dtype),
        key=zeros(heads, CHUNK, dtype=torch.float64),
        query=zeros(heads, dtype=torch.float64),
    )


@torch.no_grad()
def ssd_prefill(
    inputs: ScanInputs, boundaries: Boundaries, chunk_len: int, cache: ReplayCache, slots: Tensor
) -> Tensor:
    """`ssd_scan` of whole prompts, whose last chunks go into the cache: document i into slots[i]."""
    inputs.check(boundaries, chunk_len)
    grid, groups = boundaries.derive(_grid), inputs.B.shape[1]
    chunks = _Chunks.build(inputs.x, *_step_sizes(inputs), inputs.B, inputs.C, None, boundaries)
    target, last = slots[boundaries.document_rows], grid.last
    cache.put(target, chunks.before[last])
    cache.x[target] = chunks.x[last].transpose(1, 2)
    cache.B[target] = chunks.B.unflatten(0, (-1, groups))[last]
    cache.key[target] = chunks.key[last]
    cache.query[target] = chunks.query[last][..., -1]  # padding decays nothing
    return grid.flatten(_outputs(chunks, inputs.D))


@torch.no_grad()
def ssd_step(inputs: ScanInputs, cache: ReplayCache, slots: Tensor, positions: Tensor) -> Tensor:
    """`ssd_scan` of one token for each row, as one row of its chunk: [b, h, p].

    slots [b] int64; positions [b] int64: the tokens' places in their documents, which say where a chunk starts.
    """
    x, B, C, D = inputs.x, inputs.B, inputs.C, inputs.D
    acc, (b, heads, p), (groups, n) = accumulate_dtype(x.dtype), x.shape, B.shape[1:]
    place = positions % CHUNK
    _start_chunks(cache, slots[place == 0], positions[place == 0])
    step, decay = _step_sizes(inputs)
    query = cache.query[slots] + decay
    cache.query[slots] = query
    cache.key[slots, :, place] = query - step.log()
    cache.x[slots, :, place] = x
    cache.B[slots, :, place] = B

    state = cache.state if cache.rounded is None else cache.rounded
    key, values, keys, before = (_rows(y, slots) for y in (cache.key, cache.x, cache.B, state))
    unseen = torch.arange(CHUNK, device=x.device) > place[:, None]
    decays = (query[..., None] - key).to(acc).masked_fill_(unseen[:, None], -math.inf).exp_()
    only_row = C.reshape(b * groups, 1, n)
    scores = bmm(only_row, keys.flatten(0, 1).transpose(1, 2)).reshape(b, groups, 1, CHUNK)
    mixing = decays.view(b, groups, -1, CHUNK).mul_(scores).to(x.dtype)
    mixed = bmm(mixing.view(-1, 1, CHUNK), values.flatten(0, 1))[:, 0].view(b, heads, p)
    carried = bmm(only_row, before.view(b * groups, n, -1))[:, 0].reshape(b, heads, p)
    out = (carried * query.to(acc).exp_()[..., None]).add_(mixed)
    if D is not None:
        out += x * D.to(acc)[:, None]
    return out.to(x.dtype)


def _start_chunks(cache: ReplayCache, slots: Tensor, positions: Tensor) -> None:
    """Carry the state over a full chunk, or start a document with none."""
    if not len(slots):
        return
    last, groups = cache.query[slots], cache.B.shape[1]
    added = _added(cache.x[slots].transpose(1, 2), cache.B[slots].flatten(0, 1), last, cache.key[slots])
    state = cache.state[slots] * _factors(last, groups, added.dtype) + added
    cache.put(slots, state.masked_fill_((positions == 0)[:, None, None, None, None], 0))
    cache.query[slots] = 0


def _rows(x: Tensor, slots: Tensor) -> Tensor:
    """x[slots]; a view where the slots are neighbours, which saves copying whole states."""
    first = int(slots[0])
    neighbours = torch.equal(slots, torch.arange(first, first + len(slots), device=slots.device))
    return x[first : first + len(slots)] if neighbours else x[slots]
