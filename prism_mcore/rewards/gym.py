"""reasoning-gym's own scorers, one for each of its tasks."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from prism_mcore.rewards.format import boxed, final_answer


def gym(record: Mapping[str, Any], response: str) -> dict[str, float]:
    """correct = 1 where record["metadata"]["source_dataset"]'s scorer gives the final answer full marks, else 0.

    Its partial marks do not count: "17" gets half of them where the answer is 7.
    """
    answer = final_answer(response)
    inside = boxed(answer)
    entry = {"question": "", **record}
    score = _scorer(str(record["metadata"]["source_dataset"]))(answer if inside is None else inside.strip(), entry)
    return {"correct": float(score >= 1.0)}


@functools.cache
def _scorer(task: str) -> Callable[[str, Mapping[str, Any]], float]:
    from reasoning_gym.factory import get_score_answer_fn

    return get_score_answer_fn(task)
