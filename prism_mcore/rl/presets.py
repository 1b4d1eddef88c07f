"""Algorithms by name: `rl.preset=dapo` sets these switches of `rl.*`; one that is given beside it must agree.

Numbers are the sources' own; where a source gives none, the line says so.
"""

from typing import Any

Preset = dict[str, Any]

PRESETS: dict[str, Preset] = {
    # PRISM, arXiv 2603.17074, Table 21 and appendix D: this project's defaults. Whether the reference moves and groups
    # without spread stay is in its recipes, parts/rl.yaml.
    "paper": {
        "advantage": "grpo",
        "ratio": "token",
        "clip": "ppo",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "correction": "truncate",
        "tis_cap": 2.0,
        "aggregation": "group_total",
        "kl": "k3",
        "kl_in": "loss",
        "kl_coefficient": 0.05,
    },
    # DeepSeekMath, arXiv 2402.03300, §4.2; no correction between engines.
    "grpo": {
        "advantage": "grpo",
        "ratio": "token",
        "clip": "ppo",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "correction": "truncate",
        "tis_cap": 0.0,
        "aggregation": "sequence_mean",
        "kl": "k3",
        "kl_in": "loss",
        "kl_coefficient": 0.04,
    },
    # DAPO, arXiv 2503.14476, §4.1; how often to draw again is not stated there, verl's recipe allows 10.
    "dapo": {
        "advantage": "grpo",
        "ratio": "token",
        "clip": "ppo",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "aggregation": "token_mean",
        "kl_coefficient": 0.0,
        "dynamic_sampling": 10,
        "overlong": "soft",
    },
    # Dr. GRPO, arXiv 2503.20783, §3.2: no length, no standard deviation, no KL.
    "dr_grpo": {
        "advantage": "dr_grpo",
        "ratio": "token",
        "clip": "ppo",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregation": "constant",
        "kl_coefficient": 0.0,
    },
    # GSPO, arXiv 2507.18071, §5.1.
    "gspo": {
        "advantage": "grpo",
        "ratio": "sequence",
        "clip": "ppo",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "sequence_mean",
        "kl_coefficient": 0.0,
    },
    # CISPO, arXiv 2506.13585, §3.1: no lower bound; the upper one is not stated there, ScaleRL (2510.13786) has 5.
    "cispo": {
        "advantage": "grpo",
        "ratio": "token",
        "clip": "cispo",
        "clip_low": 1.0,
        "clip_high": 4.0,
        "aggregation": "token_mean",
        "kl_coefficient": 0.0,
    },
    # RLOO, arXiv 2402.14740: REINFORCE on whole responses, the KL in the reward; its coefficient there is 0.03 or 0.1.
    "rloo": {
        "advantage": "rloo",
        "ratio": "token",
        "clip": "none",
        "aggregation": "constant",
        "kl": "k1",
        "kl_in": "reward",
        "kl_coefficient": 0.03,
    },
    # REINFORCE++, arXiv 2501.03262, §3: k1 in the reward, here of the whole response; advantages over the batch;
    # coefficient 0.01 (OpenRLHF's).
    "reinforce_pp": {
        "advantage": "reinforce_pp",
        "ratio": "token",
        "clip": "ppo",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregation": "token_mean",
        "kl": "k1",
        "kl_in": "reward",
        "kl_coefficient": 0.01,
    },
}


def listed() -> str:
    """Every preset and what it sets, for `--help`."""
    return "; ".join(f"{name}: {', '.join(f'{k}={v}' for k, v in preset.items())}" for name, preset in PRESETS.items())


def with_preset(given: dict[str, Any]) -> dict[str, Any]:
    """The section's settings as given, with those of its preset.

    Raises ValueError for an unknown preset and for settings that contradict it.
    """
    name = given.get("preset") or ""
    if not name:
        return given
    if name not in PRESETS:
        raise ValueError(f"preset={name}; needed: one of {', '.join(PRESETS)}")
    others = [
        f"{key}={given[key]} (the preset's is {value})"
        for key, value in PRESETS[name].items()
        if key in given and not _same(given[key], value)
    ]
    if others:
        raise ValueError(
            f"preset={name} contradicts {', '.join(others)}; give what the preset has, or leave one of them out"
        )
    return {**PRESETS[name], **given}


def _same(given: Any, value: Any) -> bool:
    """Does a setting as YAML gives it mean this value? 1e-8 without a dot is a text there."""
    try:
        return float(given) == float(value)
    except (TypeError, ValueError):
        return given == value
