"""How tokens are drawn, and what generation may use. Nothing here imports torch."""

from typing import Annotated, ClassVar

from pydantic import Field

from prism_mcore.config import ProgramSettings, Section
from prism_mcore.model.settings import KernelSettings, PrecisionSettings
from prism_mcore.parallel import ParallelSettings

TENSORWISE_GENERATION = (
    "with one scale for all tokens of a batch each changes the others, and decoding has other batches than training;"
    " use blockwise, whose scales are a token's own, or off"
)


class Sampling(Section):
    """How tokens are drawn: one uniform number per token from (seed, step, prompt, sample, position)."""

    temperature: float = Field(
        default=1.0, ge=0, description="Divides the logits; 0 takes the likeliest token (log-probs are then those at 1)"
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Draw from the likeliest tokens that reach this probability together"
    )
    top_k: int = Field(default=0, ge=0, description="Draw from this many likeliest tokens; 0 from all")
    max_tokens: int = Field(default=256, ge=1, description="Longest response, in tokens")
    samples: int = Field(default=1, ge=1, description="Responses to each prompt; its group in RL")
    seed: int = Field(default=0, ge=0, lt=2**64, description="Seed of the uniform numbers")
    ignore_eos: bool = Field(default=False, description="Go on after an end-of-sequence token")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[], description="Texts that end a response")
    stop_in_think: bool = Field(
        default=True, description="A stop text ends a response inside <think>, too; else only after </think>"
    )
    stop_ids: list[Annotated[int, Field(ge=0)]] = Field(
        default=[], description="Tokens that end a response, beside the tokenizer's end-of-sequence token"
    )


class EngineSettings(Section):
    """What generation may use: running sequences and memory of their caches."""

    slots: int = Field(default=256, ge=1, description="Most sequences that run at once, per model replica")
    cache_gb: float | None = Field(
        default=None,
        gt=0,
        description="Memory of the caches per rank; null is half of what is free on a GPU, a quarter on a CPU",
    )
    prefill_tokens: int = Field(
        default=8192, ge=1, description="Prompt tokens in one forward pass; a longer prompt has a pass of its own"
    )


class GenerateSettings(ProgramSettings):
    """All settings of launch/generate.py."""

    program: ClassVar[str] = "launch/generate.py"

    sampling: Sampling = Sampling()
    generate: EngineSettings = EngineSettings()
    parallel: ParallelSettings = ParallelSettings()
    precision: PrecisionSettings = PrecisionSettings()
    kernels: KernelSettings = Field(default_factory=dict)
