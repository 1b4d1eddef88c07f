"""A study that runs in a minute: `from tiny.studies import write_study`."""

from pathlib import Path
from typing import Any

import yaml
from tiny.recipes import write_midtrain_recipe, write_rl_recipe


def write_study(folder: Path, **sections: Any) -> Path:
    """Two steps of mid-training and of RL of a tiny hybrid, evaluated; sections: what differs."""
    for program, write in (("midtrain", write_midtrain_recipe), ("rl", write_rl_recipe)):
        steps = {"steps": 6, "validate_every": 3} if program == "midtrain" else {"steps": 2, "validate_every": 1}
        more: dict[str, Any] = {"data": {"validation_fraction": 0.1}} if program == "midtrain" else {}
        path = write(folder, parallel={"tp": 1}, train=steps, checkpoint={"every": 2}, **more)
        settings = yaml.safe_load(path.read_text())
        settings["run"] = {}
        if program == "rl":
            settings["model"] = {}
            settings["rl"]["tokenizer"] = ""
        (folder / f"{program}.yaml").write_text(yaml.safe_dump(settings))
    small = ["sampling.max_tokens=6", "sampling.samples=2", "precision.dtype=fp32", "grading.workers=1"]
    study: dict[str, Any] = {
        "study": {"name": "tiny", "dir": str(folder / "studies"), "tokenizer": str(folder)},
        "models": {"hybrid": {}},
        "mixtures": {"m": {"recipe": "midtrain.yaml"}},
        "rl_mixes": {"math": {"recipe": "rl.yaml"}},
        "arms": {
            "m": {"program": "midtrain", "mixture": "m"},
            "m-rl": {"program": "rl", "from": "m", "rl_mix": "math"},
        },
        "evaluate": {"quiz": {"tasks": [str(folder / "held-out.jsonl")], "settings": small, "of": ["m"]}},
    }
    recipe = folder / "study.yaml"
    recipe.write_text(yaml.safe_dump(study | sections))
    return recipe
