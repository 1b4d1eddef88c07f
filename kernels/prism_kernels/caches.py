"""What generation remembers between tokens: pages of keys and values, convolution inputs, scan states."""

# b rows of a decode step, c channels, k taps, h heads, hk key heads, p head_dim, n state

from dataclasses import dataclass, fields

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


@dataclass(frozen=True, eq=False)
class ScanCache(SlotCache):
    state: Tensor  # [slots, h, p, n] fp32, after the last token


@dataclass(frozen=True, eq=False)
class PagedCache:
    """Keys and values of one layer in blocks; position i of a sequence is row i % block_len of block i // block_len."""

    keys: Tensor  # [blocks, block_len, hk, p]
    values: Tensor  # [blocks, block_len, hk, p]

    @property
    def block_len(self) -> int:
        return self.keys.shape[1]

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v [t, hk, p] to rows `slots` [t] int64 of the flattened [blocks * block_len]."""
        self.keys.flatten(0, 1).index_copy_(0, slots, k.to(self.keys.dtype))
        self.values.flatten(0, 1).index_copy_(0, slots, v.to(self.values.dtype))
