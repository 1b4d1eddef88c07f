"""Recipes that run in seconds: `from tiny.recipes import write_midtrain_recipe`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tiny.models import HYBRID
from tiny.prompt_files import write_prompts

from prism_mcore.data.token_file import TokenFileWriter


def write_midtrain_recipe(folder: Path, **sections: dict[str, Any]) -> Path:
    """Two tensor-parallel ranks train a tiny hybrid on a made corpus; sections: settings that differ."""
    with TokenFileWriter(folder / "corpus", np.uint16) as writer:
        writer.add(np.arange(4000) % 61, np.full(100, 40))
    settings = {
        "run": {"name": "run", "dir": str(folder)},
        "parallel": {"tp": 2},
        "data": {"sources": [{"path": str(folder / "corpus")}], "seq_len": 16, "document_mask": True},
        "train": {"steps": 2000, "global_batch": 2},
        "log": {"tensorboard": False},
    }
    return _write(folder, settings, sections)


def write_rl_recipe(folder: Path, **sections: dict[str, Any]) -> Path:
    """One rank learns the first of two choices; sections: settings that differ."""
    write_prompts(folder)
    settings = {
        "run": {"name": "run", "dir": str(folder)},
        "rl": {
            "prompts": [{"path": str(folder / "prompts.jsonl")}],
            "held_out": [{"path": str(folder / "held-out.jsonl")}],
            "tokenizer": str(folder),
            "context": 24,
            "prompts_per_step": 2,
        },
        "rewards": {"require_think": False, "workers": 1},
        "sampling": {"samples": 3, "max_tokens": 10},
        "train": {"steps": 2},
    }
    return _write(folder, settings, sections)


def _write(folder: Path, settings: dict[str, Any], sections: dict[str, dict[str, Any]]) -> Path:
    (folder / "model.json").write_text(json.dumps(HYBRID))
    settings |= {"model": {"spec": str(folder / "model.json")}, "precision": {"dtype": "fp32"}}
    for name, values in sections.items():
        settings[name] = settings.get(name, {}) | values
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    return recipe
