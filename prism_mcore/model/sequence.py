"""What every mixer needs to know of the tokens it is given, computed once per micro-batch."""

from dataclasses import dataclass

from torch import Tensor

from prism_kernels.boundaries import Boundaries


@dataclass(frozen=True)
class Sequence:
    """Where documents begin and end in the t packed tokens, and their rotary angles.

    Three tokens of one document and one of another, rotary positions over a head of 8:
        Sequence(boundaries=Boundaries([0, 3, 4]), max_seqlen=3, rope=(cos, sin))     # cos, sin [4, 8] fp32
    """

    boundaries: Boundaries
    max_seqlen: int  # tokens of the longest document
    rope: tuple[Tensor, Tensor] | None  # cos, sin, each [t, head_dim] fp32; None: no positional encoding
