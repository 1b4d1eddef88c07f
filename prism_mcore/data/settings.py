"""Settings of the data path: what is read, in which shares, and how documents become sequences."""

import math
from typing import Literal

from pydantic import Field

from prism_mcore.config import Section


class SourceSettings(Section):
    """One token file and its share of the mixture."""

    path: str = Field(
        description="Token file written by tools/tokenize_corpus.py: the prefix of PREFIX.bin and PREFIX.idx"
    )
    weight: float = Field(
        default=1.0,
        ge=0.0,
        allow_inf_nan=False,
        description="Share of training samples relative to the other sources; 0 keeps a source for validation only",
    )
    domain: str = Field(default="all", description="Name under which this source's loss is reported")


class DataSettings(Section):
    """What the model reads."""

    sources: list[SourceSettings] = Field(default_factory=list, description="List of {path, weight, domain}")
    seq_len: int = Field(default=8192, ge=1, description="Tokens in a sequence")
    packing: Literal["concat", "best_fit"] = Field(
        default="concat",
        description="concat: documents in file order, split every seq_len tokens; "
        "best_fit: documents packed whole where they fit, the rest of a sequence padded",
    )
    document_mask: bool = Field(
        default=False,
        description="Isolate documents in a sequence: attention, convolution, SSM state and labels stop at borders",
    )
    validation_fraction: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="Share of each source's tokens, at its end, kept for validation"
    )
    on_change: Literal["refuse", "continue"] = Field(
        default="refuse",
        description="Where the data is not what the run was trained on so far: refuse to resume, or continue, each"
        " source from its own number of samples",
    )
    prefetch_steps: int = Field(
        default=2, ge=0, description="Steps read ahead by a background thread; 0 reads in the loop"
    )


def normalised_shares(sources: list[SourceSettings]) -> tuple[list[float], str | None]:
    """Shares of the mixture, summing to 1, and the sentence to print where the weights did not.

    Raises ValueError where there is no source or no positive weight.
    """
    if not sources:
        raise ValueError("data.sources is empty; give at least one {path, weight, domain}")
    total = math.fsum(source.weight for source in sources)
    if total <= 0:
        raise ValueError(f"data.sources: all {len(sources)} weights are 0; at least one must be positive")
    shares = [source.weight / total for source in sources]
    if abs(total - 1.0) <= 1e-6:
        return shares, None
    listed = ", ".join(f"{source.path} {share:.4g}" for source, share in zip(sources, shares, strict=True))
    return shares, f"data.sources: weights sum to {total:g}, not 1; normalised to {listed}"
