"""What generation remembers between tokens: pages of keys and values, convolution inputs, scan states.

Shapes say what an index means, not what lies next to what. GPU kernels want contiguous tensors; on a CPU `allocate`
puts a head's block, and a slot's input of all channels, in one piece of memory, which plain torch reads in order.
"""

# b rows of a decode step, c channels, k taps, h heads, hk key heads, p head_dim, n state

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SlotCache:
    """Tensors whose first dimension is the slot: one running sequence each. Rows are overwritten in place."""

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Slots source [b] -> slots target [b], int64: how a prompt's state is forked to its samples."""
        for x in self.tensors():
            x[target] = x[source]

    def clear(self) -> None:
        for x in self.tensors():
            x.zero_()

    @property
    def bytes_per_slot(self) -> int:
        return sum(x[0].numel() * x.element_size() for x in self.tensors())


@dataclass(frozen=True, eq=False)
class ConvCache(SlotCache):
    state: Tensor  # [slots, c, k - 1] the last inputs, oldest first

    @staticmethod
    def allocate(slots: int, channels: int, taps: int, dtype: torch.dtype, device: torch.device) -> "ConvCache":
        """On a CPU channels lie next to each other: [slots, k - 1, c] in memory."""
        if torch.device(device).type != "cpu":
            return ConvCache(torch.zeros(slots, channels, taps - 1, dtype=dtype, device=device))
        return ConvCache(torch.zeros(slots, taps - 1, channels, dtype=dtype, device=device).transpose(1, 2))


@dataclass(frozen=True, eq=False)
class ScanCache(SlotCache):
    state: Tensor  # [slots, h, p, n] fp32, after the last token


@dataclass(frozen=True, eq=False)
class PagedCache:
    """Keys and values of one layer in blocks; position i of a sequence is row i % block_len of block i // block_len."""

    keys: Tensor  # [blocks, block_len, hk, p]
    values: Tensor  # [blocks, block_len, hk, p]

    @staticmethod
    def allocate(
        blocks: int, block_len: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> "PagedCache":
        """On a CPU a head's block lies in one piece of memory, of keys [p, block_len], of values [block_len, p]: what a
        decode step adds up, weighted by a query or by scores, are whole rows."""
        if torch.device(device).type != "cpu":
            both = torch.zeros(2, blocks, block_len, heads, head_dim, dtype=dtype, device=device)
            return PagedCache(both[0], both[1])
        keys = torch.zeros(blocks, heads, head_dim, block_len, dtype=dtype, device=device)
        values = torch.zeros(blocks, heads, block_len, head_dim, dtype=dtype, device=device)
        return PagedCache(keys.permute(0, 3, 1, 2), values.transpose(1, 2))

    @property
    def block_len(self) -> int:
        return self.keys.shape[1]

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v [t, hk, p] to rows `slots` [t] int64 of all blocks' rows in order: row i of block j is slot
        j * block_len + i."""
        block, row = slots // self.block_len, slots % self.block_len
        self.keys[block, row] = k.to(self.keys.dtype)
        self.values[block, row] = v.to(self.values.dtype)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Blocks source [n] -> blocks target [n], int64."""
        for x in (self.keys, self.values):
            x[target] = x[source]

    def clear(self) -> None:
        self.keys.zero_()
        self.values.zero_()

    @property
    def bytes_per_block(self) -> int:
        return sum(x[0].numel() * x.element_size() for x in (self.keys, self.values))
