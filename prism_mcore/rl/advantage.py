"""How much better than its group a rollout is. Pure numpy on rewards: the same on every rank."""

# n valid samples of a group

from collections.abc import Callable

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


ADVANTAGES: dict[str, Advantage] = {"grpo": grpo, "dr_grpo": dr_grpo}


def has_spread(group: RolloutGroup) -> bool:
    """Do the rewards of the group's valid rollouts differ? Without it nothing can be learnt from it but the KL term."""
    return len({rollout.reward for rollout in group.rollouts if rollout.valid}) > 1


def group_advantages(group: RolloutGroup, kind: str, eps: float) -> np.ndarray:
    """One advantage per rollout [samples] float64; 0 for invalid ones, which do not enter mean and std either.

    A group without spread gets exactly 0.
    """
    advantages = np.zeros(len(group.rollouts))
    if has_spread(group):
        valid = np.array([rollout.valid for rollout in group.rollouts])
        rewards = np.array([rollout.reward for rollout in group.rollouts])
        advantages[valid] = ADVANTAGES[kind](rewards[valid], eps)
    return advantages
