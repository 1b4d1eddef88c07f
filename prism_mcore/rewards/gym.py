"""reasoning-gym's own scorers, one for each of its tasks."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from prism_mcore.json_lines import shown
from prism_mcore.rewards.format import boxed, final_answer


def gym(record: Mapping[str, Any], response: str) -> dict[str, float]:
    """correct = 1 where record["metadata"]["source_dataset"]'s scorer gives the final answer full marks, else 0.

    Its partial marks do not count: "17" gets half of them where the answer is 7.
    """
    answer = final_answer(response)
    inside = boxed(answer)
    return {"correct": float(_score(record, answer if inside is None else inside.strip()) >= 1.0)}


# Some tasks have no answer of their own: their scorers follow the moves, or test the formula, that a response gives.
_PROBES = ("x", "{}")


def check(record: Mapping[str, Any]) -> None:
    """Raises ValueError, or what the scorer does, where record["metadata"] names no task, or the task's scorer does not
    take the record: its own answer gets no full marks, or, without one, some answer ends the scorer.
    """
    metadata = record["metadata"]
    if not isinstance(metadata, Mapping) or not isinstance(metadata.get("source_dataset"), str):
        raise ValueError(f"metadata is {shown(metadata)}; needed: an object whose source_dataset names the task")
    task, answer = metadata["source_dataset"], record.get("answer")
    if not _is_task(task):
        raise ValueError(f"metadata.source_dataset is {shown(task)}, which is no task of the installed reasoning-gym")
    if answer is None:
        for probe in _PROBES:
            _score(record, probe)
    elif not isinstance(answer, str):
        raise ValueError(f"answer is {shown(answer)}; needed: a text, as reasoning-gym writes it, or null")
    elif not gym(record, answer)["correct"]:
        raise ValueError(f"{task}'s scorer does not give the record's own answer {shown(answer)} full marks")


def _score(record: Mapping[str, Any], answer: str) -> float:
    return _scorer(record["metadata"]["source_dataset"])(answer, {"question": "", "answer": None, **record})


@functools.cache
def _is_task(task: str) -> bool:
    from reasoning_gym.factory import DATASETS

    return task in DATASETS


@functools.cache
def _scorer(task: str) -> Callable[[str, Mapping[str, Any]], float]:
    from reasoning_gym.factory import get_score_answer_fn

    return get_score_answer_fn(task)
