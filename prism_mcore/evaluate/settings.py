"""Settings of the programs that measure a model."""

from typing import ClassVar

from pydantic import Field

from prism_mcore.config import ProgramSettings
from prism_mcore.model.settings import KernelSettings, PrecisionSettings
from prism_mcore.parallel import ParallelSettings


class ScoreSettings(ProgramSettings):
    """All settings of launch/score.py."""

    program: ClassVar[str] = "launch/score.py"

    parallel: ParallelSettings = ParallelSettings()
    precision: PrecisionSettings = PrecisionSettings()
    kernels: KernelSettings = Field(default_factory=dict)
