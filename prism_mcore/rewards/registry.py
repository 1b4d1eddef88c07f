"""The rewards by name, and what each needs of a prompt's record. A reward of your own is one more row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prism_mcore.rewards.choice import choice
from prism_mcore.rewards.gym import gym
from prism_mcore.rewards.math import mathematics

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Reward:
    """`function(record, response)` returns named parts, such as {"correct": 1.0}."""

    function: Callable[[Record, str], dict[str, float]]
    needs: tuple[str, ...]  # keys of the record
    package: str = ""  # what it imports, of the `rl` extra


REWARDS: dict[str, Reward] = {
    "math": Reward(mathematics, ("answer",), "math_verify"),
    "gym": Reward(gym, ("answer", "metadata"), "reasoning_gym"),
    "choice": Reward(choice, ("answer",)),
}
