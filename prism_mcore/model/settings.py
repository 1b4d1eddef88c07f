"""Which model, from what weights, and what building it reads."""

from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import Field, field_validator

from prism_mcore.config import Section, SettingsError
from prism_mcore.model.rope import RopeSettings, extended
from prism_mcore.model.spec import ModelSpec, read_spec
from prism_mcore.parallel import ParallelSettings

SOURCE = "source"  # in a run's folder, or an import's: where its weights came from, and how exports of it look

RecomputeType = Literal["mamba", "attention", "mlp"]

REFUSED_RECIPES = {
    "delayed": "its scales are those of earlier steps, a state that resuming and generating would depend on",
    "mxfp8": "its blocks of 32 need compute capability 10 (Blackwell)",
}

KernelSettings = Annotated[
    dict[str, str],
    Field(description="Backend per operation where the automatic choice is not wanted, as kernels.<op>=<backend>"),
]


class ModelSettings(Section):
    """The model's shape and the weights it starts from."""

    init: str = Field(
        default="random",
        description='Weights to start from: a Hugging Face directory, a checkpoint, or "random" (from run.seed)',
    )
    spec: str | None = Field(
        default=None,
        description="The model's shape: a config.json, a directory with one, or the name of a shipped shape such as"
        " llama-3.1-8b; not needed where init is a Hugging Face directory, or a checkpoint that came from one",
    )
    rope: RopeSettings = RopeSettings()


class PrecisionSettings(Section):
    """Number formats. Gradients are summed, and moments and master weights kept, in fp32 in either."""

    dtype: Literal["bf16", "fp32"] = Field(default="bf16", description="Format of weights and activations")
    fp8: Literal["off", "tensorwise", "blockwise"] = Field(
        default="off",
        description="FP8 recipe of the large linears' products: tensorwise has a scale a tensor and e5m2 gradients,"
        " blockwise one each 128 numbers of a token and 128 x 128 of a weight, all in e4m3; weights and checkpoints"
        " stay what they are",
    )
    fp8_bf16_ends: int = Field(
        default=0, ge=0, description="First and last sub-layers that stay out of FP8, so many at each end"
    )

    @field_validator("fp8", mode="before")
    @classmethod
    def _refused(cls, value: object) -> object:
        if isinstance(value, str) and value in REFUSED_RECIPES:
            raise ValueError(f"{value} is not offered: {REFUSED_RECIPES[value]}; use tensorwise or blockwise")
        return value


class BuildSettings(Protocol):
    """The sections that building a model reads; every program's settings have them."""

    @property
    def parallel(self) -> ParallelSettings: ...

    @property
    def precision(self) -> PrecisionSettings: ...

    @property
    def kernels(self) -> KernelSettings: ...


def config_beside(weights: str | Path) -> Path | None:
    """The folder with the config.json of weights; None where there is none.

    weights: a Hugging Face directory, or a checkpoint, a run or an import, which have kept one in SOURCE.
    """
    folder = Path(weights).absolute()
    candidates = [folder, folder / SOURCE]
    if (folder / "state.json").is_file() or (folder / "latest").is_file():  # a checkpoint, or the folder of several
        candidates += [folder.parent / SOURCE, folder.parent.parent / SOURCE]
    return next((candidate for candidate in candidates if (candidate / "config.json").is_file()), None)


def resolve_spec(model: ModelSettings) -> ModelSpec:
    """The shape that `model.spec` names or, without it, that of the weights in `model.init`; with `model.rope`."""
    if model.spec is None and model.init == "random":
        raise SettingsError(
            "model.init=random needs a shape: set model.spec to a config.json or a shipped shape's name"
        )
    try:
        return extended(read_spec(model.spec or config_beside(model.init) or model.init), model.rope)
    except FileNotFoundError as error:
        if model.spec is None and Path(model.init).is_dir():
            raise SettingsError(
                f"model.init={model.init} has no config.json, and none is kept in a {SOURCE}/ beside it; set model.spec"
            ) from error
        raise SettingsError(f"{'model.spec' if model.spec else 'model.init'}: {error}") from error
    except ValueError as error:
        raise SettingsError(str(error)) from error
