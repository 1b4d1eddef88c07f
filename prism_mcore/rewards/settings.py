"""How responses are rewarded."""

from pydantic import Field

from prism_mcore.config import Section


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
