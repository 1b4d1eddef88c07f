"""Context parallelism: the t packed tokens of a micro-batch in 2 cp chunks, of which rank r holds r and 2 cp - 1 - r.

Cut by token, not by document: no padding, and every product, norm, convolution and scan has as much to do on each rank;
causal attention, too, where documents are long. What reaches back in a document reaches into other ranks' chunks:
attention for keys and values, a convolution for its last k - 1 inputs, a scan for the state that its chunk begins with.
Who needs what follows from the documents' boundaries, which every rank has, so that ranks never disagree about whether
they exchange anything.
"""

# t packed tokens of the micro-batch, L of a chunk, l = 2 L of this rank, h (query) heads, hk key heads, p head_dim,
# g SSM groups, n state, c channels, k taps

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from prism_kernels.boundaries import Boundaries, copied
from prism_kernels.precision import accumulate_dtype
from prism_kernels.scan.inputs import ScanInputs
from prism_mcore.batch import context_chunks

Attend = Callable[[Tensor, Tensor, Tensor, Boundaries, Boundaries], Tensor]  # q, k, v, where documents' q are and k


@dataclass(frozen=True, eq=False)
class ContextShard:
    """This rank's two chunks of a micro-batch, and what they need of the others.

    Rank 0 of 2, documents of 5 and 3 tokens, chunks of 2, of which it holds tokens 0, 1 and 6, 7:
        pieces        Boundaries([0, 2, 4])   # of the rank's four tokens: parts of a document in one chunk
        chunk 3       continues the second document, whose token 5 rank 1 has
    """

    group: dist.ProcessGroup
    device: torch.device
    documents: Boundaries  # of all t tokens

    @cached_property
    def size(self) -> int:
        return self.group.size()

    @cached_property
    def chunk_len(self) -> int:
        return self.documents.num_tokens // (2 * self.size)

    @cached_property
    def own(self) -> tuple[int, int]:
        """This rank's chunks."""
        return self.group.rank(), 2 * self.size - 1 - self.group.rank()

    @cached_property
    def document_starts(self) -> list[int]:
        """For each chunk, the first token of the document that its first token is of."""
        offsets = self.documents.offsets
        return [offsets[bisect_right(offsets, chunk * self.chunk_len) - 1] for chunk in range(2 * self.size)]

    def continues(self, chunk: int) -> bool:
        """Does the chunk begin inside a document?"""
        return self.document_starts[chunk] < chunk * self.chunk_len

    def ends(self, chunk: int) -> list[int]:
        """Where the chunk's pieces end, counted from its first token."""
        offsets, first = self.documents.offsets, chunk * self.chunk_len
        inside = offsets[bisect_right(offsets, first) : bisect_left(offsets, first + self.chunk_len)]
        return [*(end - first for end in dict.fromkeys(inside)), self.chunk_len]

    @cached_property
    def pieces(self) -> Boundaries:
        """Of this rank's l tokens."""
        first, second = (self.ends(chunk) for chunk in self.own)
        return self._boundaries([*first, *(self.chunk_len + end for end in second)])

    @cached_property
    def pieces_of_chunks(self) -> tuple[Boundaries, Boundaries]:
        first, second = (self._boundaries(self.ends(chunk)) for chunk in self.own)
        return first, second

    def _boundaries(self, ends: list[int]) -> Boundaries:
        return Boundaries.on(self.device, torch.tensor([0, *ends], dtype=torch.int32))

    @cached_property
    def _reaches(self) -> dict[int | None, "Reach"]:
        return {}

    def reach(self, tokens: int | None) -> "Reach":
        """What the chunks need of the `tokens` before them, None: all, that are of their first token's document."""
        if tokens not in self._reaches:
            firsts = [chunk * self.chunk_len for chunk in range(2 * self.size)]
            before = [
                range(start if tokens is None else max(start, first - tokens), first)
                for start, first in zip(self.document_starts, firsts, strict=True)
            ]
            self._reaches[tokens] = Reach(self, before)
        return self._reaches[tokens]

    def attention(
        self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, window: int | None, recomputed: bool = False
    ) -> Tensor:
        """q [l, h, p], k and v [l, hk, p], positions applied -> [l, h, p].

        Gathered keys and values are not kept for backward but gathered again; `recomputed` says that all of this will
        be computed again anyway.
        """
        reach = self.reach(None if window is None else window - 1)
        if not reach.needed:
            return attend(q, k, v, self.pieces, self.pieces)
        kv = torch.stack([k, v], 1)
        gathered = Gathered(reach, kv)
        out = []
        for i, (queries, key_values) in enumerate(zip(q.split(self.chunk_len), gathered(kv), strict=True)):
            pieces, before = self.pieces_of_chunks[i], len(reach.before[self.own[i]])
            keys = reach.keys[i] if before else pieces
            with gathered.dropping(i, key_values) if reach.travels and not recomputed else nullcontext():
                out.append(attend(queries, key_values[:, 0], key_values[:, 1], pieces, keys))
        return torch.cat(out)

    def convolution(self, conv: Callable, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`causal_conv1d` of x [l, c]."""
        taps = weight.shape[1]
        reach = self.reach(taps - 1)
        if not reach.needed:
            return conv(x, weight, bias, self.pieces)
        history = []
        for rows, pieces in zip(reach.rows_before(x), self.pieces_of_chunks, strict=True):
            history.append(F.pad(rows, (0, 0, taps - 1 - len(rows), 0))[None])
            history.append(x.new_zeros(pieces.num_documents - 1, taps - 1, x.shape[1]))
        return conv(x, weight, bias, self.pieces, initial_state=torch.cat(history).transpose(1, 2))

    def scan(self, scan: Callable, inputs: ScanInputs, chunk_len: int) -> Tensor:
        """`ssd_scan` [l, h, p]: of the pieces alone, to which is added what the states before the chunks give.

        The scan is linear in its state, so it runs once; states travel while they are as many bytes for any t.
        """
        if not any(map(self.continues, range(2 * self.size))):
            return scan(inputs, self.pieces, chunk_len)
        y, final = scan(inputs, self.pieces, chunk_len, return_final_states=True)
        last = [self.pieces_of_chunks[0].num_documents - 1, self.pieces.num_documents - 1]
        decays = self._decays(inputs)  # [2, L, h]
        sent = torch.cat([final[last].flatten(1), decays[:, -1]], 1)
        states = self._states_before(_AllGather.apply(sent, self.group), final.shape[1:])
        out = []
        for i, chunk in enumerate(self.own):
            # With no token to add to, too, so that every rank takes part in the backward pass of the gathering.
            count = self.ends(chunk)[0] if self.continues(chunk) else 0
            tokens = slice(i * self.chunk_len, i * self.chunk_len + count)
            carried = _carried(inputs.C[tokens], states[i], decays[i, :count])
            out += [y[tokens] + carried.to(y.dtype), y[tokens.stop : (i + 1) * self.chunk_len]]
        return torch.cat(out)

    def _decays(self, inputs: ScanInputs) -> Tensor:
        """[2, L, h]: a state's decay from the beginning of the chunk to each token."""
        _, log_decay = inputs.step_sizes()
        # As the scan does: a small difference of large sums loses digits.
        exact = torch.float64 if inputs.x.dtype == torch.float32 else log_decay.dtype
        return log_decay.unflatten(0, (2, -1)).to(exact).cumsum(1).to(log_decay.dtype).exp()

    def _states_before(self, sent: Tensor, shape: torch.Size) -> list[Tensor]:
        """What ranks sent [cp, 2, h p n + h] -> the state [h, p, n] that each of this rank's chunks begins with."""
        state, before = sent.new_zeros(shape), []
        for chunk in range(self.own[1] + 1):
            if chunk in self.own:
                before.append(state)
            row = sent[chunk, 0] if chunk < self.size else sent[2 * self.size - 1 - chunk, 1]
            final, decay = row[: shape.numel()].view(shape), row[shape.numel() :, None, None]
            inside_one = self.continues(chunk) and self.ends(chunk) == [self.chunk_len]
            state = torch.addcmul(final, decay, state) if inside_one else final
        return before


def _carried(C: Tensor, state: Tensor, decays: Tensor) -> Tensor:
    """decay * (C . state): C [m, g, n], state [h, p, n], decays [m, h] -> [m, h, p]."""
    (_, groups, n), (heads, head_dim, _) = C.shape, state.shape
    by_group = state.to(C.dtype).view(groups, heads // groups * head_dim, n)
    products = torch.bmm(C.transpose(0, 1), by_group.transpose(1, 2)).transpose(0, 1)
    return products.reshape(len(C), heads, head_dim) * decays[..., None]


class Reach:
    """Which rows ranks send each other so that every chunk has those of its `before`, and where they arrive.

    before: of each chunk, tokens of the t; every rank has the same list.
    """

    def __init__(self, shard: ContextShard, before: list[range]):
        self.group, self.before, self.shard = shard.group, before, shard
        size, me = shard.size, shard.group.rank()
        chunks = [context_chunks(shard.documents.num_tokens, size, rank) for rank in range(size)]
        wanted = [_union(before[rank], before[2 * size - 1 - rank]) for rank in range(size)]
        self.needed = any(map(len, before))
        # [from, to]: tokens of the t, ascending
        tokens = [[_meet(chunks[source], wanted[rank]) for rank in range(size)] for source in range(size)]
        self.travels = any(len(tokens[i][j]) for i in range(size) for j in range(size) if i != j)
        self.sends = [len(rows) for rows in tokens[me]]
        self.receives = [len(rows[me]) for rows in tokens]
        place = np.zeros(shard.documents.num_tokens, np.int64)
        arriving = np.concatenate([rows[me] for rows in tokens])
        place[arriving] = np.arange(len(arriving))
        local = np.zeros_like(place)
        local[np.concatenate([np.asarray(chunk) for chunk in chunks[me]])] = np.arange(2 * shard.chunk_len)
        self.sent = _table(local[np.concatenate(tokens[me])], shard.device)
        self.counts = [len(before[chunk]) for chunk in shard.own]
        self.order = _table(np.concatenate([place[_span(before[chunk])] for chunk in shard.own]), shard.device)

    @cached_property
    def keys(self) -> list[Boundaries]:
        """Of each of this rank's chunks with the rows before it: where documents begin and end."""
        ends = map(self.shard.ends, self.shard.own)
        return [
            self.shard._boundaries([count + end for end in of]) for count, of in zip(self.counts, ends, strict=True)
        ]

    def rows_before(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [l, ...] of this rank -> the rows before each of its chunks; differentiable, gradients travel in fp32."""
        return _RowsBefore.apply(x, self).split(self.counts)

    def exchange(self, rows: Tensor, back: bool = False) -> Tensor:
        """What this rank sends, by rank -> what it gets, by rank; `back`: the other way round."""
        sends, receives = (self.receives, self.sends) if back else (self.sends, self.receives)
        if not self.travels:
            return rows
        out = rows.new_empty(sum(receives), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), receives, sends, group=self.group)
        return out


def _union(first: range, second: range) -> list[range]:
    """Of two ranges, the second of which does not end before the first."""
    if first and second and second.start < first.stop:
        return [range(min(first.start, second.start), second.stop)]
    return [first, second]


def _span(tokens: range) -> slice:
    return slice(tokens.start, tokens.stop)


def _meet(ours: tuple[range, range], theirs: list[range]) -> np.ndarray:
    """The tokens that are in one of ours and in one of theirs."""
    both = [np.arange(max(a.start, b.start), min(a.stop, b.stop)) for a in ours for b in theirs]
    return np.concatenate(both)


def _table(rows: np.ndarray, device: torch.device) -> Tensor:
    return copied(torch.from_numpy(rows), device)


class _RowsBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, reach: Reach) -> Tensor:
        ctx.reach, ctx.shape, ctx.dtype = reach, x.shape, x.dtype
        return reach.exchange(x.index_select(0, reach.sent)).index_select(0, reach.order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Added in the order of ranks, one rank's rows at a time: the same bits every time."""
        reach, grad = ctx.reach, grad.to(accumulate_dtype(ctx.dtype))
        arrived = grad.new_zeros(sum(reach.receives), *ctx.shape[1:])
        for rows, part in zip(reach.order.split(reach.counts), grad.split(reach.counts), strict=True):
            arrived.index_add_(0, rows, part)
        returned = reach.exchange(arrived, back=True)
        total = grad.new_zeros(ctx.shape)
        for rows, part in zip(reach.sent.split(reach.sends), returned.split(reach.sends), strict=True):
            total.index_add_(0, rows, part)
        return total.to(ctx.dtype), None


class _AllGather(torch.autograd.Function):
    """x [...] of each rank -> [cp, ...]; a rank's gradient is the sum of what all have for its part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(group.size(), *x.shape)
        dist.all_gather_into_tensor(out.flatten(0, 1), x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts = torch.empty_like(grad)
        dist.all_to_all_single(parts, grad.contiguous(), group=ctx.group)
        return parts.sum(0), None


class Gathered:
    """Keys and values of each chunk with the rows before it, [., 2, hk, p], which backward gathers once more.

    A backend's function keeps its inputs for backward; `dropping` puts a note in the place of those.
    """

    def __init__(self, reach: Reach, kv: Tensor):
        self.reach, self.kv = reach, kv.detach()
        self.again: list[Tensor] = []
        self.dropped = 0

    def __call__(self, kv: Tensor) -> list[Tensor]:
        """Of this rank's kv [l, 2, hk, p]."""
        own = kv.split(self.reach.shard.chunk_len)
        return [torch.cat(both) for both in zip(self.reach.rows_before(kv), own, strict=True)]

    def dropping(self, chunk: int, gathered: Tensor) -> torch.autograd.graph.saved_tensors_hooks:
        """Inside, what is kept for backward of this chunk's is dropped."""
        storage = gathered.untyped_storage().data_ptr()

        def pack(kept: Tensor) -> Any:
            if kept.untyped_storage().data_ptr() != storage:
                return kept
            self.dropped += 1
            return kept.shape, kept.stride(), kept.storage_offset()

        def unpack(packed: Any) -> Tensor:
            return packed if isinstance(packed, Tensor) else self._gather_again(chunk).as_strided(*packed)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _gather_again(self, chunk: int) -> Tensor:
        if not self.again:
            with torch.no_grad():
                self.again = self(self.kv)
            self.left = self.dropped
        gathered = self.again[chunk]
        self.left -= 1
        if not self.left:
            self.again = []
        return gathered
