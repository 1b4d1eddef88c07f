"""The Mamba-2 scan in plain torch: chunked with an explicit backward (fast), and as the plain recurrence (the oracle).

Within a chunk, with c_i the sum of dt A up to and including token i, every pair j <= i contributes
M_ij x_j, M_ij = (C_i . B_j) exp(c_i - c_j) dt_j; what came before the chunk contributes exp(c_i) C_i . S; and the chunk
hands on exp(c_Q) S + sum_j exp(c_Q - c_j) dt_j B_j x_j. dt_j is kept inside the exponent (as log dt_j), so that x, B, C
and the incoming gradient enter the products within a chunk unscaled and therefore unrounded in bf16. Exponents are
base 2: torch.exp of fp32 is four times slower than torch.exp2 on a CPU (0.65 against 0.17 ns per element).
"""

# t packed tokens, h heads, p head_dim, g groups, n state, C chunks, Q tokens in a chunk, m = h / g heads in a group

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from prism_kernels.boundaries import Boundaries, ChunkGrid
from prism_kernels.caches import ScanCache
from prism_kernels.precision import LOG2_E, accumulate_dtype
from prism_kernels.scan.inputs import ScanInputs

CPU_CHUNK = 64  # 128 is 15% slower in fp32, 256 twice as slow
BLOCK_ELEMENTS = 2**18  # of the [chunks, h, Q, Q] decays alive at a time: 1 MiB in fp32 stays in a core's L2 cache
STATE_ELEMENTS = 2**17  # of a decode step's states worked on at a time: 512 KiB in fp32 stay in the cache


def ssd_scan(
    inputs: ScanInputs,
    boundaries: Boundaries,
    chunk_len: int,
    initial_state: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's selective scan of packed documents, in chunks.

    initial_state: [documents, h, p, n] (zeros where None).
    Returns y [t, h, p] in x.dtype and, on request, the final states [documents, h, p, n] fp32.
    chunk_len changes the result by rounding only: it is the longest chunk allowed, and a CPU takes at most 64.
    Decays and states are fp32 (fp64 for fp64 inputs), products are in x.dtype. Source: arXiv 2405.21060, section 6.
    """
    inputs.check(boundaries, chunk_len)
    x, B, C, D = inputs.x, inputs.B, inputs.C, inputs.D
    step, decay = inputs.step_sizes()
    grid = boundaries.chunks(min(chunk_len, CPU_CHUNK) if x.device.type == "cpu" else chunk_len)
    y, final = _ChunkedScan.apply(x, step, decay, B, C, D, initial_state, boundaries, grid, return_final_states)
    return (y, final) if return_final_states else y


class _Chunks(NamedTuple):
    """A scan's inputs on the chunk grid, and its decays."""

    x: Tensor  # [C, Q, h, p]
    B: Tensor  # [C * g, Q, n]
    C: Tensor  # [C * g, Q, n]
    step: Tensor  # [C, h, Q] dt, 0 in padding
    query: Tensor  # [C, h, Q] log2 of the decay from the chunk's start to i; fp64 where x is fp32
    key: Tensor  # [C, h, Q] the same minus log2 dt_j: exp2(query_i - key_j) = dt_j * decay from j to i
    from_start: Tensor  # [C, h, Q] exp2(query)
    to_end: Tensor  # [C, h, Q] dt_j * decay from j to the chunk's end
    total: Tensor  # [C, h] decay over the chunk
    scores: Tensor  # [C * g, Q, Q] C_i . B_j, lower triangle

    @staticmethod
    def build(x: Tensor, step: Tensor, decay: Tensor, B: Tensor, C: Tensor, grid: ChunkGrid) -> "_Chunks":
        B, C = (_by_group(grid.fill(y), y.shape[1]) for y in (B, C))
        step = grid.fill(step).transpose(1, 2).contiguous()
        # A small difference of large sums loses digits: in fp32 5e-4 of a model's largest logit, with 32 heads.
        exact = torch.float64 if x.dtype == torch.float32 else step.dtype
        query = grid.fill(decay).transpose(1, 2).to(exact).cumsum(2).mul_(LOG2_E)
        key = query - step.log2()
        return _Chunks(
            x=grid.fill(x),
            B=B,
            C=C,
            step=step,
            query=query,
            key=key,
            from_start=query.to(step.dtype).exp2(),
            to_end=(query[..., -1:] - key).to(step.dtype).exp2_(),
            total=query[..., -1].to(step.dtype).exp2(),
            scores=torch.bmm(C, B.transpose(1, 2)).tril_(),
        )

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Chunks to work on at a time: rows of [C, ...] and of [C * g, ...] tensors."""
        num_chunks, heads, length = self.step.shape
        groups = len(self.B) // num_chunks
        size = max(1, BLOCK_ELEMENTS // (heads * length * length))
        for start in range(0, num_chunks, size):
            end = min(start + size, num_chunks)
            yield slice(start, end), slice(start * groups, end * groups)

    def decays(self, block: slice) -> Tensor:
        """[chunks, h, Q, Q] dt_j * decay from j to i; 1 above the diagonal, where the scores are 0."""
        return (self.query[block, :, :, None] - self.key[block, :, None]).to(self.step.dtype).tril_().exp2_()


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[C, Q, ...] with g * k values per token -> [C * g, Q, k]; a view where there is one group."""
    return x.reshape(*x.shape[:2], groups, math.prod(x.shape[2:]) // groups).transpose(1, 2).flatten(0, 1)


def _scale(x: Tensor, factor: Tensor, groups: int) -> Tensor:
    """x [C, Q, h, p] * factor [C, h, Q] -> [C * g, Q, m * p] in x.dtype."""
    return _by_group((x * factor.transpose(1, 2)[..., None]).to(x.dtype), groups)


def _scale_heads(x: Tensor, factor: Tensor, groups: int) -> Tensor:
    """x [C * g, Q, m * p] * factor [C, h, Q] -> [C, h, Q, p] in x.dtype, contiguous."""
    num_chunks, heads, length = factor.shape
    x = x.view(num_chunks, groups, length, heads // groups, -1).transpose(2, 3)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(x, factor.view(*x.shape[:-1], 1), out=out)
    return out.flatten(1, 2)


def _states_inward(state: Tensor, groups: int) -> Tensor:
    """[documents, h, p, n] -> [documents, g, n, m, p], the layout in which states are products of the others."""
    return state.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3)


def _states_outward(state: Tensor) -> Tensor:
    return state.permute(0, 1, 3, 4, 2).flatten(1, 2)


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, step, decay, B, C, D, initial, boundaries, grid, want_final):
        heads, groups, acc = x.shape[1], B.shape[1], accumulate_dtype(x.dtype)
        chunks = _Chunks.build(x, step, decay, B, C, grid)
        num_chunks, length = chunks.x.shape[:2]

        local = torch.bmm(chunks.B.transpose(1, 2), _scale(chunks.x, chunks.to_end, groups)).to(acc)
        local = local.view(num_chunks, groups, B.shape[2], heads // groups, -1)
        total = chunks.total.view(num_chunks, groups, 1, heads // groups, 1)
        before = torch.empty_like(local)
        if initial is None:
            before[grid.first] = 0
        else:
            before[grid.first] = _states_inward(initial.to(acc), groups)[boundaries.document_rows]
        for chunk, previous in grid.steps:
            before[chunk] = torch.addcmul(local[previous], before[previous], total[previous])
        final = None
        if want_final:
            shape = (boundaries.num_documents, heads, x.shape[2], B.shape[2])
            final = local.new_zeros(shape) if initial is None else initial.to(acc, copy=True)
            last = torch.addcmul(local[grid.last], before[grid.last], total[grid.last])
            final[boundaries.document_rows] = _states_outward(last)
        before = before.flatten(0, 1).flatten(2).to(x.dtype)  # [C * g, n, m * p]

        carried = torch.bmm(chunks.C, before)  # [C * g, Q, m * p]
        y = torch.empty_like(chunks.x, memory_format=torch.contiguous_format)
        for block, grouped in chunks.blocks():
            decays = chunks.decays(block)
            count = len(decays)
            mixing = decays.view(count, groups, -1, length, length).mul_(
                chunks.scores[grouped].view(count, groups, 1, length, length)
            )
            values = chunks.x[block].transpose(1, 2).contiguous()
            out = _scale_heads(carried[grouped], chunks.from_start[block], groups)
            if D is not None:
                out.addcmul_(values, D.to(x.dtype)[:, None, None])
            out.flatten(0, 1).baddbmm_(mixing.view(-1, length, length).to(x.dtype), values.flatten(0, 1))
            y[block] = out.transpose(1, 2)
        ctx.save_for_backward(x, step, decay, B, C, D, before)
        ctx.boundaries, ctx.grid, ctx.has_initial = boundaries, grid, initial is not None
        ctx.set_materialize_grads(False)
        return grid.flatten(y), final

    @staticmethod
    def backward(ctx, grad, grad_final):
        x, step, decay, B, C, D, before = ctx.saved_tensors
        grid, rows = ctx.grid, ctx.boundaries.document_rows
        heads, groups, acc = x.shape[1], B.shape[1], accumulate_dtype(x.dtype)
        grad = torch.zeros_like(x) if grad is None else grad
        chunks, grad = _Chunks.build(x, step, decay, B, C, grid), grid.fill(grad)
        num_chunks, length = chunks.x.shape[:2]
        wide = (num_chunks, groups, B.shape[2], heads // groups, x.shape[2])  # a state's shape

        # Gradient of the state before each chunk, from the last chunk of each document to the first.
        grad_out = _scale(grad, chunks.from_start, groups)
        grad_before = torch.bmm(chunks.C.transpose(1, 2), grad_out).to(acc).view(wide)
        total = chunks.total.view(num_chunks, groups, 1, heads // groups, 1)
        grad_after = torch.empty_like(grad_before)
        grad_after[grid.last] = 0 if grad_final is None else _states_inward(grad_final.to(acc), groups)[rows]
        for chunk, previous in reversed(grid.steps):
            grad_after[previous] = grad_before[chunk].addcmul_(grad_after[chunk], total[chunk])
        grad_initial = None
        if ctx.has_initial:
            grad_initial = grad_after.new_zeros(ctx.boundaries.num_documents, heads, x.shape[2], B.shape[2])
            if grad_final is not None:  # an empty document's final state is its initial state
                grad_initial.copy_(grad_final)
            first = torch.addcmul(grad_before[grid.first], grad_after[grid.first], total[grid.first])
            grad_initial[rows] = _states_outward(first)

        # What the states contribute to each gradient. `rising` is the gradient of query, `falling` minus that of key.
        grad_total = (grad_after * before.view(wide)).sum((2, 4)).view(num_chunks, heads) * chunks.total
        grad_after = grad_after.view(before.shape).to(x.dtype)
        weighted = _scale(chunks.x, chunks.to_end, groups)
        grad_weighted = torch.bmm(chunks.B, grad_after)
        grad_B = torch.bmm(weighted, grad_after.transpose(1, 2))
        grad_C = torch.bmm(grad_out, before.transpose(1, 2))
        falling = _head_sums(weighted, grad_weighted, num_chunks, heads)
        rising = _head_sums(grad_out, torch.bmm(chunks.C, before), num_chunks, heads)
        grad_total += falling.sum(-1)

        # What pairs within a chunk contribute.
        grad_scores = torch.empty_like(chunks.scores)
        grad_x = torch.empty_like(chunks.x, memory_format=torch.contiguous_format)
        grad_D = None if D is None else torch.zeros_like(D, dtype=acc)
        for block, grouped in chunks.blocks():
            decays = chunks.decays(block)
            count = len(decays)
            decays = decays.view(count, groups, -1, length, length)
            scores = chunks.scores[grouped].view(count, groups, 1, length, length)
            mixing = (decays * scores).view(-1, length, length).to(x.dtype)
            values, grads = (y[block].transpose(1, 2).contiguous() for y in (chunks.x, grad))
            grad_mixing = torch.bmm(grads.flatten(0, 1), values.flatten(0, 1).transpose(1, 2)).view(decays.shape)
            out = _scale_heads(grad_weighted[grouped], chunks.to_end[block], groups)
            if D is not None:
                out.addcmul_(grads, D.to(x.dtype)[:, None, None])
                grad_D += grads.to(acc).mul(values).sum((0, 2, 3))
            out.flatten(0, 1).baddbmm_(mixing.transpose(1, 2), grads.flatten(0, 1))
            grad_x[block] = out.transpose(1, 2)
            decays.mul_(grad_mixing)
            grad_scores[grouped] = decays.sum(2).flatten(0, 1).tril_()
            pairs = decays.mul_(scores).view(count, heads, length, length)
            rising[block] += pairs.sum(-1)
            falling[block] += pairs.sum(-2)
        grad_B.baddbmm_(grad_scores.transpose(1, 2), chunks.C)
        grad_C.baddbmm_(grad_scores, chunks.B)

        grad_step = torch.where(chunks.step > 0, falling / chunks.step, 0)
        grad_query = rising.sub_(falling)
        grad_query[..., -1] += grad_total
        grad_decay = grad_query.flip(-1).cumsum(-1).flip(-1)
        return (
            grid.flatten(grad_x),
            grid.flatten(grad_step.transpose(1, 2)),
            grid.flatten(grad_decay.transpose(1, 2)),
            *(grid.flatten(y.unflatten(0, (-1, groups)).transpose(1, 2)) for y in (grad_B, grad_C)),
            None if grad_D is None else grad_D.to(D.dtype),
            grad_initial,
            *(None,) * 3,
        )


def _head_sums(a: Tensor, b: Tensor, num_chunks: int, heads: int) -> Tensor:
    """Sum over p of a * b, both [C * g, Q, m * p]: [C, h, Q] in the accumulation dtype."""
    product = a.to(accumulate_dtype(a.dtype)).mul(b)
    groups = len(a) // num_chunks
    sums = product.view(num_chunks, groups, a.shape[1], heads // groups, -1).sum(-1)
    return sums.transpose(2, 3).reshape(num_chunks, heads, -1)


def ssd_recurrence(
    inputs: ScanInputs, boundaries: Boundaries, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`ssd_scan` as the recurrence that defines it, one token at a time: (y, final states). Slow; for tests."""
    x, B, C, D = inputs.x, inputs.B, inputs.C, inputs.D
    acc, (step, decay) = accumulate_dtype(x.dtype), inputs.step_sizes()
    heads, groups = x.shape[1], B.shape[1]
    wide_B, wide_C = (y.to(acc).repeat_interleave(heads // groups, 1) for y in (B, C))
    wide_x = x.to(acc)
    rows, finals = [], []
    for i in range(boundaries.num_documents):
        state = wide_x.new_zeros(*x.shape[1:], B.shape[2]) if initial_state is None else initial_state[i].to(acc)
        for j in range(boundaries.offsets[i], boundaries.offsets[i + 1]):
            update = (wide_x[j] * step[j, :, None])[..., None] * wide_B[j][:, None]
            state = state * decay[j].exp()[:, None, None] + update
            y = (state * wide_C[j][:, None]).sum(-1)
            rows.append(y if D is None else y + wide_x[j] * D.to(acc)[:, None])
        finals.append(state)
    return torch.stack(rows).to(x.dtype), torch.stack(finals)


def ssd_cache(
    slots: int, heads: int, head_dim: int, groups: int, state: int, dtype: torch.dtype, device: torch.device
) -> ScanCache:
    """An empty cache for `ssd_prefill` and `ssd_step`; dtype is that of the activations."""
    shape = (slots, heads, head_dim, state)
    return ScanCache(torch.zeros(shape, dtype=accumulate_dtype(dtype), device=device))


def ssd_prefill(inputs: ScanInputs, boundaries: Boundaries, chunk_len: int, cache: ScanCache, slots: Tensor) -> Tensor:
    """`ssd_scan` of whole documents whose states go on in slots [documents] int64 of the cache: y [t, h, p]."""
    y, final = ssd_scan(inputs, boundaries, chunk_len, return_final_states=True)
    cache.state[slots] = final.to(cache.state.dtype)
    return y


def ssd_step(inputs: ScanInputs, cache: ScanCache, slots: Tensor, positions: Tensor) -> Tensor:
    """`ssd_scan` of one token for each row: [b, h, p].

    slots [b] int64: the rows' places in the cache, which move on; positions [b] int64: the token's place in its
    document, for caches that restart at each chunk (not this one).
    """
    x, D, acc = inputs.x, inputs.D, accumulate_dtype(inputs.x.dtype)
    (b, heads, head_dim), (groups, n) = x.shape, inputs.B.shape[1:]
    step, log_decay = inputs.step_sizes()
    decay = log_decay.exp()[..., None, None]
    wide, by_group = x.to(acc), (b, groups, heads // groups, -1)
    scaled = (wide * step[..., None]).view(*by_group, 1)
    B, C = (y.to(acc)[:, :, None, None] for y in (inputs.B, inputs.C))  # [b, g, 1, 1, n]
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
