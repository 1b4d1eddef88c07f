"""How much better than others a rollout is. Pure numpy on rewards: the same on every rank."""

# n valid samples of a group, N valid samples of an update

from collections.abc import Callable, Sequence

import numpy as np

from prism_mcore.batch import RolloutGroup

Advantage = Callable[[np.ndarray, float], np.ndarray]


def grpo(rewards: np.ndarray, eps: float) -> np.ndarray:
    """(r - mean) / (std + eps), the standard deviation of the population. Source: GRPO, arXiv 2402.03300, §4.1.2.

    Rewards 1, 0, 0, 0: mean 0.25, std 0.433, advantages 1.732, -0.577, -0.577, -0.577.
    """
    return (rewards - rewards.mean()) / (rewards.std() + eps)


def dr_grpo(rewards: np.ndarray, eps: float) -> np.ndarray:
    """r - mean: questions that are nearly always or never solved get no larger steps. Source: arXiv 2503.20783.

    Rewards 1, 0, 0, 0: advantages 0.75, -0.25, -0.25, -0.25.
    """
    return rewards - rewards.mean()


def rloo(rewards: np.ndarray, eps: float) -> np.ndarray:
    """r - mean of the others, an unbiased baseline; 0 for a sample alone. Source: RLOO, arXiv 2402.14740, §2.

    Rewards 1, 0, 0, 0: advantages 1, -1/3, -1/3, -1/3.
    """
    others = max(len(rewards) - 1, 1)
    return (rewards - rewards.mean()) * (len(rewards) / others)


def _itself(rewards: np.ndarray, eps: float) -> np.ndarray:
    return rewards


def _normalised(values: np.ndarray, eps: float) -> np.ndarray:
    """(a - mean) / (std + eps) over the whole update. Source: REINFORCE++, arXiv 2501.03262, §3."""
    return (values - values.mean()) / (values.std() + eps)


# Of a group, and whether the update's are then normalised.
ADVANTAGES: dict[str, tuple[Advantage, bool]] = {
    "grpo": (grpo, False),
    "dr_grpo": (dr_grpo, False),
    "rloo": (rloo, False),
    "reinforce_pp": (_itself, True),
    "reinforce_pp_baseline": (dr_grpo, True),
}


def has_spread(group: RolloutGroup) -> bool:
    """Do the rewards of the group's valid rollouts differ? Without it a group says nothing of which were better."""
    return len({rollout.reward for rollout in group.rollouts if rollout.valid}) > 1


def advantages(groups: Sequence[RolloutGroup], kind: str, eps: float) -> list[np.ndarray]:
    """One advantage per rollout of an update, [samples] float64 by group; 0 for invalid ones, which count nowhere.

    A group without spread gets exactly 0 where the advantage is relative to the group alone.
    """
    of_group, over_update = ADVANTAGES[kind]
    made = []
    for group in groups:
        valid = np.array([rollout.valid for rollout in group.rollouts], bool)
        values = np.zeros(len(group.rollouts))
        if valid.any() and (has_spread(group) or of_group is _itself):
            rewards = np.array([rollout.reward for rollout in group.rollouts])
            values[valid] = of_group(rewards[valid], eps)
        made.append((values, valid))
    every = np.concatenate([values[valid] for values, valid in made]) if made else np.zeros(0)
    if over_update and len(every):
        places = np.cumsum([0, *(valid.sum() for _, valid in made)])
        whole = _normalised(every, eps) if every.std() else np.zeros_like(every)
        for (values, valid), start, end in zip(made, places, places[1:], strict=False):
            values[valid] = whole[start:end]
    return [values for values, _ in made]
