"""Which model, and from what weights."""

from pydantic import BaseModel, ConfigDict, Field


class ModelSettings(BaseModel):
    """The model's shape and the weights it starts from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    init: str = Field(
        default="random",
        description='Weights to start from: a Hugging Face directory, a checkpoint, or "random" (from run.seed)',
    )
    spec: str | None = Field(
        default=None,
        description="The model's shape: a config.json, a directory with one, or the name of a shipped shape such as"
        " llama-3.1-8b; not needed where init is a Hugging Face directory",
    )
