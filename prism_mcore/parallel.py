"""How many ranks share the work, and in which way."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ParallelSettings(BaseModel):
    """The degrees of each kind of parallelism; data parallelism takes the ranks that are left."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tp: int = Field(1, ge=1, description="Tensor parallel ranks: every weight matrix is cut into this many parts")
    pp: int = Field(1, ge=1, description="Pipeline stages: the sub-layers are dealt out over this many ranks")
    vpp: int = Field(
        1, ge=1, description="Virtual stages (model chunks) per pipeline rank; above 1 is interleaved 1F1B"
    )
    cp: int = Field(1, ge=1, description="Context parallel ranks: every sequence is cut into this many parts")
    sequence_parallel: bool = Field(
        False, description="Cut the activations between tensor-parallel regions along the sequence (needs tp > 1)"
    )
    split: Literal["auto"] | list[int] = Field(
        "auto",
        description="Sub-layers per pipeline chunk in model order, pp*vpp numbers (chunk k is on stage k % pp);"
        " auto minimises the slowest chunk by FLOPs",
    )
    optimizer_instances: int = Field(
        1,
        ge=1,
        description="Replicas of the distributed optimizer: its state is cut over data-parallel ranks / this many"
        " (the paper's shard 8 x replicate 16 on 128 GPUs is 16)",
    )
