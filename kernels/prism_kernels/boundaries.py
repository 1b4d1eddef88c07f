"""Where documents start and end in a packed batch, and what the ops derive from it, computed once per micro-batch."""

# t packed tokens, Q tokens in a chunk, C chunks

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Rows: TypeAlias = (
    slice | Tensor
)  # which rows of a [C, ...] tensor: a slice where they are evenly spaced, else int64 indices


def copied(table: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`, in stream order: a copy from pageable memory waits for all work before it."""
    if device.type != "cuda" or table.device.type != "cpu":
        return table.to(device)
    return (table if table.is_pinned() else table.pin_memory()).to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Boundaries:
    """Document i is rows cu_seqlens[i]:cu_seqlens[i + 1] of every [t, ...] activation.

    cu_seqlens: [documents + 1] int32, starts at 0, ends at t, may repeat a value (an empty document).
    on_cpu: the same where cu_seqlens is on a device, so that its values are not waited for (`Boundaries.on`).
    Everything else is derived on first use and kept, so that forty layers share one record per micro-batch.
    """

    cu_seqlens: Tensor
    on_cpu: Tensor | None = None

    @staticmethod
    def on(device: torch.device, cu_seqlens: Tensor) -> "Boundaries":
        """Boundaries known on the CPU, for activations on `device`; nothing there is waited for."""
        return Boundaries(copied(cu_seqlens, device), cu_seqlens)

    @cached_property
    def offsets(self) -> list[int]:
        values = self.cu_seqlens if self.on_cpu is None else self.on_cpu
        offsets = values.tolist() if values.dim() == 1 else []
        if not offsets or offsets[0] != 0 or offsets[-1] == 0 or any(b < a for a, b in pairwise(offsets)):
            shown = ", ".join(map(str, offsets[:8]))
            raise ValueError(
                "cu_seqlens must be a non-decreasing list from 0 to the number of tokens (at least 1); "
                f"got [{shown}...] of shape {tuple(self.cu_seqlens.shape)}"
            )
        return offsets

    @property
    def num_tokens(self) -> int:
        return self.offsets[-1]

    @property
    def num_documents(self) -> int:
        """Empty ones included: rows of an initial or final state."""
        return len(self.offsets) - 1

    @cached_property
    def documents(self) -> list[tuple[int, int, int]]:
        """(index, start, end) of each document that has a token."""
        return [(i, start, end) for i, (start, end) in enumerate(pairwise(self.offsets)) if end > start]

    @cached_property
    def uniform_len(self) -> int | None:
        """The length of every non-empty document, or None where lengths differ."""
        lengths = {end - start for _, start, end in self.documents}
        return lengths.pop() if len(lengths) == 1 else None

    @cached_property
    def document_rows(self) -> Rows:
        """Non-empty documents' rows in a [documents, ...] state."""
        ids = [i for i, _, _ in self.documents]
        if ids == list(range(len(ids))):
            return slice(0, len(ids))
        return copied(torch.tensor(ids), self.cu_seqlens.device)

    @cached_property
    def _history_slots(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {}

    def history_slots(self, before: int) -> tuple[Tensor, Tensor]:
        """Places in a row with `before` more in front of each non-empty document: (tokens [t], those [., before])."""
        if before not in self._history_slots:
            starts = torch.tensor([start for _, start, _ in self.documents])
            lengths = torch.tensor([end - start for _, start, end in self.documents])
            order = torch.arange(len(starts))
            tokens = torch.arange(self.num_tokens) + before * (1 + order.repeat_interleave(lengths))
            history = (starts + before * order)[:, None] + torch.arange(before)
            device = self.cu_seqlens.device
            self._history_slots[before] = copied(tokens, device), copied(history, device)
        return self._history_slots[before]

    @cached_property
    def _blocks(self) -> dict[int, Tensor]:
        return {}

    def blocks(self, length: int) -> Tensor:
        """Blocks of at most `length` tokens, none across documents: [blocks, 4] int32, which kernels loop over.

        Each is (its first token, its document's first token, the one after its document's last, its document's index).
        """
        if length not in self._blocks:
            rows = [(at, start, end, i) for i, start, end in self.documents for at in range(start, end, length)]
            self._blocks[length] = copied(torch.tensor(rows, dtype=torch.int32), self.cu_seqlens.device)
        return self._blocks[length]

    @cached_property
    def _last_rows(self) -> dict[int, tuple[Tensor, Tensor | None]]:
        return {}

    def last_rows(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Each document's last `count` tokens, oldest first: ([documents, count] int64, which of them are missing).

        A missing one has as its index its place among the `count` that came before the document; None: none is.
        """
        if count not in self._last_rows:
            rows = [[end - count + i for i in range(count)] for end in self.offsets[1:]]
            missing = [[row < start for row in last] for last, start in zip(rows, self.offsets, strict=False)]
            for last, start in zip(rows, self.offsets, strict=False):
                last[:] = [row if row >= start else row - start + count for row in last]
            device = self.cu_seqlens.device
            mask = copied(torch.tensor(missing), device) if any(map(any, missing)) else None
            self._last_rows[count] = copied(torch.tensor(rows), device), mask
        return self._last_rows[count]

    @cached_property
    def _grids(self) -> dict[int, "ChunkGrid"]:
        return {}

    def chunks(self, chunk_len: int) -> "ChunkGrid":
        """The grid of chunks of at most chunk_len tokens that restarts at each document."""
        if chunk_len < 1:
            raise ValueError(f"chunk_len={chunk_len}; needs at least 1")
        if chunk_len not in self._grids:
            longest = max(end - start for _, start, end in self.documents)
            self._grids[chunk_len] = ChunkGrid.build(self, min(chunk_len, longest))
        return self._grids[chunk_len]

    @cached_property
    def _derived(self) -> dict[Callable[["Boundaries"], Any], Any]:
        return {}

    def derive(self, function: Callable[["Boundaries"], T]) -> T:
        """function(self), computed once: what a single op needs, defined beside it."""
        if function not in self._derived:
            self._derived[function] = function(self)
        return self._derived[function]

    @cached_property
    def _scan_tables(self) -> dict[tuple[int, int, torch.device], "ScanTables"]:
        return {}

    def scan_tables(self, chunk_len: int, segment_chunks: int, device: torch.device) -> "ScanTables":
        """What the scan's kernels look up: chunks of at most chunk_len tokens, segments of segment_chunks chunks."""
        key = (chunk_len, segment_chunks, device)
        if key not in self._scan_tables:
            self._scan_tables[key] = ScanTables.build(self, *key)
        return self._scan_tables[key]

    def check_keys(self, keys: "Boundaries") -> None:
        """Each document has, in `keys`, at least as many tokens as here."""
        if keys is self:
            return
        if keys.num_documents != self.num_documents:
            raise ValueError(f"keys of {keys.num_documents} documents, queries of {self.num_documents}")
        for i, start, end in self.documents:
            count = keys.offsets[i + 1] - keys.offsets[i]
            if count < end - start:
                raise ValueError(f"document {i} has {end - start} queries and {count} keys; needs a key for each query")

    def check(self, **activations: Tensor) -> None:
        """Every given [t, ...] tensor has as many rows as the documents have tokens."""
        for name, x in activations.items():
            if x.shape[0] != self.num_tokens:
                raise ValueError(f"{name} has {x.shape[0]} tokens, cu_seqlens ends at {self.num_tokens}")


@dataclass(frozen=True, eq=False)
class ChunkGrid:
    """[t, ...] tokens laid out as [C, Q, ...] chunks; a document's last chunk is padded with zeros."""

    chunk_len: int  # Q
    num_chunks: int
    num_tokens: int
    uniform: tuple[int, int] | None  # (documents, length) where all lengths are equal: no index is needed
    slot: Tensor | None  # [t] each token's place in the [C * Q] grid, where lengths differ
    steps: list[tuple[Rows, Rows]]  # step j: (chunk j, chunk j - 1) of each document that has a chunk j; j = 1, 2, ...
    first: Rows  # [non-empty documents] first chunk of each
    last: Rows  # [non-empty documents] last chunk of each

    @staticmethod
    def build(boundaries: Boundaries, q: int) -> "ChunkGrid":
        lengths = [end - start for _, start, end in boundaries.documents]
        counts = [-(-length // q) for length in lengths]
        num_chunks, num_tokens = sum(counts), boundaries.num_tokens
        if boundaries.uniform_len is not None:
            n = counts[0]
            steps: list[tuple[Rows, Rows]] = [(slice(j, None, n), slice(j - 1, None, n)) for j in range(1, n)]
            uniform = (len(lengths), lengths[0])
            return ChunkGrid(q, num_chunks, num_tokens, uniform, None, steps, slice(0, None, n), slice(n - 1, None, n))
        device = boundaries.cu_seqlens.device

        def rows(ids: list[int]) -> Tensor:
            return copied(torch.tensor(ids, dtype=torch.int64), device)

        starts = [sum(counts[:i]) for i in range(len(counts))]
        steps = []
        for j in range(1, max(counts)):
            current = [start + j for start, count in zip(starts, counts, strict=True) if count > j]
            steps.append((rows(current), rows([c - 1 for c in current])))
        slot = [torch.arange(length) + start * q for start, length in zip(starts, lengths, strict=True)]
        return ChunkGrid(
            chunk_len=q,
            num_chunks=num_chunks,
            num_tokens=num_tokens,
            uniform=None,
            slot=copied(torch.cat(slot), device),
            steps=steps,
            first=rows(starts),
            last=rows([start + count - 1 for start, count in zip(starts, counts, strict=True)]),
        )

    def fill(self, x: Tensor) -> Tensor:
        """[t, ...] -> [C, Q, ...], zeros where there is no token; a view where the documents fill their chunks."""
        shape = (self.num_chunks, self.chunk_len, *x.shape[1:])
        if self.num_tokens == self.num_chunks * self.chunk_len and self.uniform:
            return x.view(shape) if x.is_contiguous() else x.unflatten(0, shape[:2])
        grid = x.new_zeros(shape)
        if self.uniform:
            documents, length = self.uniform
            grid.view(documents, -1, *x.shape[1:])[:, :length] = x.unflatten(0, (documents, length))
        else:
            grid.flatten(0, 1)[self.slot] = x
        return grid

    def flatten(self, grid: Tensor) -> Tensor:
        """[C, Q, ...] -> [t, ...]: what `fill` did, undone."""
        if self.num_tokens == self.num_chunks * self.chunk_len and self.uniform:
            return grid.flatten(0, 1)
        if self.uniform:
            documents, length = self.uniform
            return grid.reshape(documents, -1, *grid.shape[2:])[:, :length].flatten(0, 1)
        return grid.flatten(0, 1)[self.slot]


@dataclass(frozen=True, eq=False)
class ScanTables:
    """Where each chunk, each segment (a run of chunks of one document) and each document is, as kernels look it up.

    Documents of 5, 0 and 2 tokens, chunks of 2, segments of 2 chunks:
        chunks     [[0, 2, 0, 0, 1], [2, 2, 0, 0, 1], [4, 1, 1, 1, 0], [5, 2, 2, 0, 0]]
        segments   [[0, 2, 0, 4, 0, 1, 0], [2, 1, 4, 5, 0, 0, 1], [3, 1, 5, 7, 2, 1, 1]]
        documents  [[0, 0, 2], [2, 2, 3]]
    """

    chunks: Tensor  # [C, 5] int32: first token, tokens, segment, is a segment of the document before it, after it
    segments: Tensor  # [segments, 7] int32: first chunk, chunks, first token, end token, document, is first, is last
    documents: Tensor  # [documents with a token, 3] int32: document, first segment, end segment
    carries: bool  # a document has more than one segment

    @staticmethod
    def build(boundaries: Boundaries, chunk_len: int, segment_chunks: int, device: torch.device) -> "ScanTables":
        chunks: list[tuple[int, ...]] = []
        segments: list[tuple[int, ...]] = []
        documents: list[tuple[int, ...]] = []
        for document, start, end in boundaries.documents:
            first_segment = len(segments)
            for token in range(start, end, segment_chunks * chunk_len):
                stop = min(token + segment_chunks * chunk_len, end)
                before, after = token > start, stop < end
                count = -(-(stop - token) // chunk_len)
                segments.append((len(chunks), count, token, stop, document, not before, not after))
                for first in range(token, stop, chunk_len):
                    chunks.append((first, min(chunk_len, stop - first), len(segments) - 1, before, after))
            documents.append((document, first_segment, len(segments)))

        def table(rows: Sequence[tuple[int, ...]]) -> Tensor:
            return copied(torch.tensor(rows, dtype=torch.int32), device)

        carries = len(segments) > len(documents)
        return ScanTables(table(chunks), table(segments), table(documents), carries)

    @property
    def num_chunks(self) -> int:
        return len(self.chunks)

    @property
    def num_segments(self) -> int:
        return len(self.segments)


def document_ends(boundaries: Boundaries) -> Tensor:
    """[documents with a token + 1] int32: cu_seqlens without its padding.

    The loader pads them to one length, which a kernel with a grid of documents takes for thousands of empty ones.
    """
    ends = torch.tensor([0, *(end for _, _, end in boundaries.documents)], dtype=torch.int32)
    return copied(ends, boundaries.cu_seqlens.device)


def document_ids(boundaries: Boundaries) -> Tensor:
    """[1, t] int32: which document each token is of."""
    ids = torch.empty(1, boundaries.num_tokens, dtype=torch.int32)
    for i, start, end in boundaries.documents:
        ids[0, start:end] = i
    return copied(ids, boundaries.cu_seqlens.device)


def longest_document(boundaries: Boundaries) -> int:
    return max(end - start for _, start, end in boundaries.documents)
