"""Rollouts that a step's token budget left unfinished: carried to the next step, and kept in checkpoints.

A group is in the loss when all of its rollouts are done. Each of its tokens keeps the version of the weights that
sampled it, and its log-prob then: the policy's ratio to that corrects for it (policy_loss.py).
"""

from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import Any

import numpy as np

from prism_mcore.batch import Rollout, RolloutGroup
from prism_mcore.rl.prompts import PromptSet
from prism_mcore.rl.rollout import UNFINISHED

ARRAYS = {"tokens": np.int32, "logprobs": np.float32, "versions": np.int32}  # [response], as base64 in a checkpoint


def part(groups: Sequence[RolloutGroup]) -> tuple[list[RolloutGroup], list[RolloutGroup]]:
    """(groups of which every rollout is done, the others)."""
    done = [group for group in groups if all(rollout.finish != UNFINISHED for rollout in group.rollouts)]
    others = [group for group in groups if any(rollout.finish == UNFINISHED for rollout in group.rollouts)]
    return done, others


def to_record(groups: Sequence[RolloutGroup]) -> list[dict[str, Any]]:
    """As JSON; of a prompt, its place in the mixture and its tokens."""
    return [
        {
            "prompt": group.prompt.index,
            "tokens": list(group.prompt.tokens),
            "rollouts": [_saved(r) for r in group.rollouts],
        }
        for group in groups
    ]


def from_record(record: Sequence[dict[str, Any]], prompts: PromptSet) -> tuple[list[RolloutGroup], int]:
    """The groups of `to_record`, and how many were left out: their prompt is not what it was."""
    groups = []
    for saved in record:
        prompt = prompts.numbered(saved["prompt"]) if saved["prompt"] < len(prompts) else None
        if prompt is not None and list(prompt.tokens) == saved["tokens"]:
            made = tuple(_loaded(one, prompt.index, prompt.tokens) for one in saved["rollouts"])
            groups.append(RolloutGroup(prompt, made))
    return groups, len(record) - len(groups)


def _saved(rollout: Rollout) -> dict[str, Any]:
    scalars = ("group", "sample", "key", "temperature", "finish", "stop_token", "verifier", "valid")
    arrays = {
        name: b64encode(np.asarray(getattr(rollout, name), kind).tobytes()).decode() for name, kind in ARRAYS.items()
    }
    return {name: getattr(rollout, name) for name in scalars} | {"rewards": dict(rollout.rewards)} | arrays


def _loaded(saved: dict[str, Any], prompt: int, prompt_tokens: tuple[int, ...]) -> Rollout:
    arrays = {name: np.frombuffer(b64decode(saved[name]), kind) for name, kind in ARRAYS.items()}
    fields = saved | arrays | {"tokens": tuple(arrays["tokens"].tolist()), "key": tuple(saved["key"])}
    return Rollout(prompt=prompt, prompt_tokens=prompt_tokens, **fields)
