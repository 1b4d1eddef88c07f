"""What a forward pass is told beside its tokens: where documents lie; in generation, which sequences they continue.

A prompt's pass (`Prefill`) runs the ops of training over packed whole prompts and stores what they end with; a decoding
pass (`Decode`) adds one token to each of many sequences.
"""

# t packed tokens, b sequences (rows of a decoding pass), L blocks of the longest context

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from prism_kernels.boundaries import Boundaries
from prism_kernels.caches import ConvCache, PagedCache, SlotCache
from prism_mcore.model.context_shard import ContextShard
from prism_mcore.model.shared_prefix import SharedPrefixes


@dataclass(frozen=True)
class PackedTokens:
    """Where documents begin and end in the t packed tokens, and their rotary angles; made once per micro-batch.

    Three tokens of one document and one of another, rotary positions over a head of 8:
        PackedTokens(boundaries=Boundaries([0, 3, 4]), max_seqlen=3, rope=(cos, sin))     # cos, sin [4, 8] fp32
    """

    boundaries: Boundaries
    max_seqlen: int  # tokens of the longest document
    rope: tuple[Tensor, Tensor] | None  # cos, sin, each [t, head_dim] fp32; None: no positional encoding
    # Documents reach back into others, or into other ranks' chunks; None: each is whole.
    reach: SharedPrefixes | ContextShard | None = None
    recomputed: bool = False  # will all of the sub-layer be computed again in backward?


@dataclass(frozen=True, eq=False)
class Prefill:
    """Whole prompts of 3 and 1 tokens that go to slots 5 and 2; the first one's keys start at block 7 of 64 tokens:

    Prefill(slots=[5, 2], rows=[448, 449, 450, 64])
    """

    slots: Tensor  # [documents] int64: where each prompt's convolution and scan states go
    rows: Tensor  # [t] int64: block * block_len + place in it, where each token's key and value go


@dataclass(frozen=True, eq=False)
class Decode:
    """One more token for the sequences in slots 2 and 5, of which 1 and 3 tokens are already cached:

    Decode(slots=[2, 5], positions=[1, 3], rows=[65, 451], block_table=[[1], [7]], lengths=[2, 4])
    """

    slots: Tensor  # [b] int64
    positions: Tensor  # [b] int64: the token's place in its sequence
    rows: Tensor  # [b] int64: where its key and value go
    block_table: Tensor  # [b, L] int32: each sequence's blocks in order
    lengths: Tensor  # [b] int32: tokens of each sequence, this one included


@dataclass(frozen=True, eq=False)
class MambaCache:
    """A Mamba sub-layer's states, one of each kind for every slot."""

    conv: ConvCache
    scan: SlotCache  # what the op `ssd_cache` makes


Cache: TypeAlias = PagedCache | MambaCache | None  # of an attention, a Mamba and an MLP sub-layer


@dataclass(frozen=True, eq=False)
class State:
    """A sub-layer's view of a pass."""

    step: Prefill | Decode
    cache: Cache
