"""Rotary positions beyond those a model was trained on: a larger base, Llama 3's scaling or YaRN."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from prism_mcore.config import Section, SettingsError
from prism_mcore.model.spec import ModelSpec, RopeScaling, YarnScaling, read_config


class RopeSettings(Section):
    """Positions beyond those that the model was trained on; exports say so in their config.json."""

    positions: int = Field(
        default=0, ge=0, description="Positions that the model is to have (max_position_embeddings); 0: as it has"
    )
    theta: float = Field(default=0.0, ge=0, description="Base of the rotary frequencies; 0: the model's")
    scaling: Literal["keep", "none", "llama3", "yarn"] = Field(
        default="keep", description="How frequencies are scaled; keep: as the model has it"
    )
    factor: float = Field(
        default=0.0,
        ge=0,
        description="How many times the original positions llama3 and yarn reach; 0: positions / original",
    )
    original: int = Field(
        default=0,
        ge=0,
        description="Positions before scaling; 0: those of the model, or of the scaling that it has already",
    )


def extended(spec: ModelSpec, rope: RopeSettings) -> ModelSpec:
    """The model with these positions; a SettingsError where it cannot have them. Twice with a scaling is as once."""
    if rope == RopeSettings():
        return spec
    if spec.position != "rope" and rope != RopeSettings(positions=rope.positions):
        raise SettingsError(
            f"model.rope.* scales rotary positions, and this {spec.family} has none: nothing limits its length; give"
            " model.rope.positions alone, which its config.json then says"
        )
    if rope.scaling in ("keep", "none") and (rope.factor or rope.original):
        raise SettingsError(
            f"model.rope.factor and original are of llama3 and yarn; model.rope.scaling={rope.scaling} has none"
        )
    return replace(
        spec,
        max_positions=rope.positions or spec.max_positions,
        rope_theta=rope.theta or spec.rope_theta,
        rope_scaling=spec.rope_scaling if rope.scaling == "keep" else _scaling(spec, rope),
    )


def _scaling(spec: ModelSpec, rope: RopeSettings) -> RopeScaling | YarnScaling | None:
    if rope.scaling == "none":
        return None
    before = spec.rope_scaling.original_max_positions if spec.rope_scaling else spec.max_positions
    original = rope.original or before
    factor = rope.factor or (rope.positions or spec.max_positions) / original
    if factor <= 1:
        raise SettingsError(
            f"model.rope.scaling={rope.scaling} by {factor:g} reaches no further than model.rope.original={original};"
            " give model.rope.positions above that, or scaling=none"
        )
    if rope.scaling == "llama3":
        return RopeScaling(factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=original)
    return YarnScaling(factor, original, YarnScaling.usual_attention_factor(factor))


def write_positions(file: Path, spec: ModelSpec) -> None:
    """Make a config.json say what positions the spec has, under the keys that it has for them."""
    raw = config_with_positions(read_config(file), spec)
    temporary = file.with_name(f".tmp_{file.name}")
    temporary.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)


def config_with_positions(raw: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """A parsed config.json with the spec's positions, as transformers 4 or 5 writes them."""
    raw = raw | {"max_position_embeddings": spec.max_positions}
    if spec.position != "rope":
        return raw
    scaling = spec.rope_scaling.as_config() if spec.rope_scaling else None
    if raw.get("rope_parameters") is None:
        return raw | {"rope_theta": spec.rope_theta, "rope_scaling": scaling}
    raw = {name: value for name, value in raw.items() if name not in ("rope_theta", "rope_scaling")}
    return raw | {"rope_parameters": {"rope_theta": spec.rope_theta} | (scaling or {"rope_type": "default"})}
