"""The rewards by name, and what each needs of a prompt's record. A reward of your own is one more row."""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prism_mcore.json_lines import shown
from prism_mcore.rewards import choice, code, gym, math

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Reward:
    """`function(record, response)` returns named parts, such as {"correct": 1.0}.

    check(record) raises ValueError, or whatever the function would, where no response could be rewarded: it tries the
    record's own answer where there is one. It is called once for each prompt, before a run starts.
    """

    function: Callable[[Record, str], dict[str, float]]
    needs: tuple[str, ...] = ()  # keys of the record, none of which may be missing, null or blank
    package: str = ""  # what it imports, of the `rl` extra
    check: Callable[[Record], None] | None = None
    runs_programs: bool = False  # in the sandbox, with time of their own


REWARDS: dict[str, Reward] = {
    "math": Reward(math.mathematics, ("answer",), "math_verify", math.check),
    "gym": Reward(gym.gym, ("metadata",), "reasoning_gym", gym.check),
    "choice": Reward(choice.choice, ("answer",), check=choice.check),
    "code": Reward(code.code, ("tests",), "pyseccomp", code.check, runs_programs=True),
}


def check_record(record: Record) -> str:
    """The name of the reward that a record asks for. Raises ValueError where that reward cannot use the record."""
    name = record.get("reward")
    if not isinstance(name, str) or name not in REWARDS:
        raise ValueError(f"reward {shown(name)}; known rewards are {', '.join(REWARDS)}")
    reward = REWARDS[name]
    if reward.package and not _installed(reward.package):
        raise ValueError(f"reward {name} needs {reward.package}: pip install 'prism_mcore[rl]'")
    for key in reward.needs:
        value = record.get(key)
        if value is None or (isinstance(value, str) and not value.strip()):
            raise ValueError(f"reward {name} needs {key!r}; the record has {', '.join(sorted(record))}")
    if reward.check is not None:
        try:
            reward.check(record)
        except Exception as error:  # of a package, perhaps: what it is given comes from outside
            what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"reward {name} cannot use the record: {what}") from error
    return name


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
