"""Runs of either loop on tiny models: `from tiny.runs import assert_same_state, records, settings_of, state_of`."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny.models import CONFIGS

COMMON: dict[str, dict[str, Any]] = {
    "run": {"name": "run", "seed": 3},
    "precision": {"dtype": "fp32"},
    "log": {"tensorboard": False},
}


def settings_of(kind, runs, spec, defaults, sections):
    """Settings of a program, for a run called `run` in the folder `runs`; sections override defaults key by key."""
    spec_file = Path(runs) / f"{spec.replace(' ', '-')}.json"
    spec_file.parent.mkdir(exist_ok=True)
    spec_file.write_text(json.dumps(CONFIGS[spec]))
    below = COMMON | {"model": {"spec": str(spec_file)}} | defaults
    below["run"] = below["run"] | {"dir": str(runs)}
    return kind(**{name: below.get(name, {}) | sections.get(name, {}) for name in {*below, *sections}})


def state_of(run):
    """Weights by name, and the optimizer's moments, of this rank."""
    weights = {name: t.detach().clone() for chunk in run.chunks for name, t, _ in chunk.module.table()}
    return weights, run.optimizer.chained_optimizers[0].optimizer.state_dict()["state"]


def assert_same_state(want, got):
    """Two ranks' `state_of` are equal, bit for bit."""
    (weights, moments), (weights_2, moments_2) = want, got
    assert all(torch.equal(weights[name], weights_2[name]) for name in weights)
    for key, state in moments.items():
        assert all(torch.equal(state[n], moments_2[key][n]) for n in ("exp_avg", "exp_avg_sq", "step"))


def records(runs, name="metrics.jsonl"):
    """What the run has written."""
    return [json.loads(line) for line in (Path(runs) / "run" / name).read_text().splitlines()]
