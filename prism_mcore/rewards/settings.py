"""How responses are rewarded."""

from typing import Literal

from pydantic import Field

from prism_mcore.config import Section
from prism_mcore.rewards.code import Limits


class RewardSettings(Section):
    """Rules around the rewards that prompts name."""

    require_think: bool = Field(
        default=True,
        description="Correctness counts only where the response is <think>...</think> and then an answer",
    )
    stop_token_penalty: float = Field(
        default=0.1, ge=0.0, description="Taken off a response that does not end with a stop token"
    )
    repetition_penalty: float = Field(
        default=0.1, ge=0.0, description="Times the share of repeated n-grams, taken off a response"
    )
    repetition_ngram: int = Field(default=20, ge=1, description="Tokens in such an n-gram")
    workers: int = Field(default=4, ge=1, description="Verifier processes on each data-parallel rank")
    timeout_s: float = Field(default=10.0, gt=0.0, description="Longest a response may be verified; then it is masked")
    code_test_s: float = Field(
        default=4.0, gt=0.0, description="Longest a program may take for a test; then it fails it"
    )
    code_program_s: float = Field(
        default=30.0, gt=0.0, description="Longest a program may take for all its tests; it fails those not reached"
    )
    code_memory_mb: int = Field(default=512, ge=64, description="MiB of address space that a program may take")
    code_score: Literal["share", "all"] = Field(
        default="share", description="A program that fails some tests gets the share it passes, or nothing"
    )

    def code_limits(self) -> Limits:
        return Limits(self.code_test_s, self.code_program_s, self.code_memory_mb, self.code_score)
