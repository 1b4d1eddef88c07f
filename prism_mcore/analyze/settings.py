"""Settings of the analyses that run models."""

from typing import ClassVar

from pydantic import Field

from prism_mcore.config import ProgramSettings, Section
from prism_mcore.model.settings import KernelSettings, PrecisionSettings
from prism_mcore.parallel import ParallelSettings


class SimilaritySettings(Section):
    """How alike models see the same prompts."""

    draws: int = Field(default=200, ge=2, description="Draws of half of the prompts, for the intervals; the paper: 20")
    seed: int = Field(default=0, ge=0, description="Seed of the draws")


class AnalyzeSettings(ProgramSettings):
    """All settings of launch/analyze.py."""

    program: ClassVar[str] = "launch/analyze.py"

    similarity: SimilaritySettings = SimilaritySettings()
    parallel: ParallelSettings = ParallelSettings()
    precision: PrecisionSettings = PrecisionSettings()
    kernels: KernelSettings = Field(default_factory=dict)
