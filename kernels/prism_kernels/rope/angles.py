"""The angles of rotary embedding: frequencies, and the tables of cosines and sines that every backend takes."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def rope_frequencies(head_dim: int, theta: float, scaling: dict | None = None) -> Tensor:
    """Radians per position of each of head_dim/2 pairs, fp32, as transformers computes them.

    scaling: None, or as in a config.json: Llama-3's dict with `rope_type` "llama3", `factor`, `low_freq_factor`,
    `high_freq_factor` and `original_max_position_embeddings`, or YaRN's (arXiv 2309.00071) with "yarn", `factor`,
    `beta_fast`, `beta_slow` and `original_max_position_embeddings`.
    """
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    kind = (scaling or {}).get("rope_type", "default")
    if not scaling or kind == "default":
        return inv_freq
    if kind == "yarn":
        return _yarn_frequencies(inv_freq, head_dim, theta, scaling)
    if kind != "llama3":
        raise ValueError(f"rope scaling {kind!r} is not supported; supported are default, llama3 and yarn")
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * torch.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    medium = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(medium, blended, scaled)


def _yarn_frequencies(inv_freq: Tensor, head_dim: int, theta: float, scaling: dict) -> Tensor:
    """Pairs that turn more than beta_fast times in the original length stay, those below beta_slow are interpolated."""
    original = scaling["original_max_position_embeddings"]

    def pair(turns: float) -> float:
        """Which pair makes so many turns in the original length."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair(scaling["beta_fast"])), 0)
    high = min(math.ceil(pair(scaling["beta_slow"])), head_dim - 1)
    ramp = (torch.arange(head_dim // 2).float() - low) / (high - low if high != low else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    # In transformers' order of operations: 1 / (factor * theta ** ...), not (1 / theta ** ...) / factor.
    powers = theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return 1.0 / (scaling["factor"] * powers) * (1 - kept) + 1.0 / powers * kept


def rope_table(position_ids: Tensor, head_dim: int, theta: float, scaling: dict | None = None) -> tuple[Tensor, Tensor]:
    """What `apply_rope` takes, each [t, head_dim] fp32, for position_ids of t elements in any shape: once per batch.

    cos of each angle, twice; sin of each angle, first negated (for the half that is subtracted), then plain. Both are
    multiplied by the scaling's `attention_factor` where it has one.
    """
    inv_freq = _frequencies_on(position_ids.device, head_dim, theta, tuple((scaling or {}).items()))
    angles = position_ids.reshape(-1, 1).float() * inv_freq
    cos, sin = angles.cos(), angles.sin()
    if (stretch := (scaling or {}).get("attention_factor", 1.0)) != 1.0:
        cos, sin = cos * stretch, sin * stretch
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


@lru_cache(maxsize=16)
def _frequencies_on(device: torch.device, head_dim: int, theta: float, scaling: tuple[tuple[str, Any], ...]) -> Tensor:
    """Copied to a device once: a copy waits for a GPU, and is refused while a CUDA graph is captured."""
    with torch.inference_mode(False):  # the first to ask may be generation, the next training
        return rope_frequencies(head_dim, theta, dict(scaling)).to(device)
