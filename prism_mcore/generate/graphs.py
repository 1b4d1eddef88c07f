"""Decoding passes as CUDA graphs: one launch in place of hundreds, which a small batch waits for.

A graph replays the same kernels on the same addresses: numbers of rows are rounded up, and rows that are too many work
on a slot and a block of nobody. Weights are read where they are, so that a graph outlives optimizer steps; a decoding
pass comes after a prefill of the same stream, which has waited for their gather.
"""

# b rows, L blocks of the longest sample, v vocabulary (local)

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from prism_mcore.generate.replica import BLOCK_LEN
from prism_mcore.model.ops import Ops

ROWS = 32  # rows are rounded up to a multiple of this: 8 graphs for 256 slots

# (token, slot, position, row of the cache) [4, b] int64, block table [b, L] int32 -> logits [b, v]
Forward = Callable[[Tensor, Tensor], Tensor]


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    rows: Tensor  # [4, b] int64
    table: Tensor  # [b, L] int32
    logits: Tensor  # [b, v]


def capturable(ops: Ops, head_dim: int, device: torch.device) -> bool:
    """On a GPU, with kernels that never ask the device how long a sequence is: the reference of attention does."""
    if device.type != "cuda" or ops.backends["attention_decode"].name != "triton":
        return False
    from prism_kernels.attention.decode import HEAD_DIMS  # triton

    return head_dim in HEAD_DIMS


class DecodeGraphs:
    """A decoding pass, captured for each rounded number of rows when it first occurs."""

    def __init__(self, blocks: int, scratch_slot: int, scratch_block: int, device: torch.device):
        self.blocks, self.device = blocks, device
        self.nobody = torch.tensor([0, scratch_slot, 0, scratch_block * BLOCK_LEN], device=device)[:, None]
        self.scratch_block = scratch_block
        self.graphs: dict[int, _Graph] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Forward, rows: Tensor, table: Tensor) -> Tensor:
        """forward(rows, table), the same function in every call; the logits are overwritten by the next one."""
        b = rows.shape[1]
        size = -(-b // ROWS) * ROWS
        if size not in self.graphs:
            self.graphs[size] = self._capture(forward, size)
        graph = self.graphs[size]
        graph.rows[:, b:], graph.table[b:] = self.nobody, self.scratch_block
        graph.rows[:, :b], graph.table[:b, : table.shape[1]] = rows, table
        graph.graph.replay()
        return graph.logits[:b]

    def _capture(self, forward: Forward, size: int) -> _Graph:
        rows = self.nobody.repeat(1, size)
        table = torch.full((size, self.blocks), self.scratch_block, dtype=torch.int32, device=self.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles kernels, fills workspaces
            forward(rows, table)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = forward(rows, table)
        return _Graph(graph, rows, table, logits)
