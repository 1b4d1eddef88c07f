"""Mathematical answers, compared as expressions by math-verify."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from prism_mcore.json_lines import shown
from prism_mcore.rewards.format import boxed, final_answer


def mathematics(record: Mapping[str, Any], response: str) -> dict[str, float]:
    r"""correct = 1 where the final answer equals record["answer"] as an expression, else 0.

    The last \boxed{} counts where there is one, else what math-verify finds in the text after the reasoning.
    """
    answer = final_answer(response)
    found = boxed(answer)
    gold = str(record["answer"]).strip()
    if not answer:
        return {"correct": 0.0}
    if (found if found is not None else answer).strip() == gold:
        return {"correct": 1.0}
    return {"correct": float(_equal(gold, answer if found is None else f"${found}$"))}


def check(record: Mapping[str, Any]) -> None:
    """Raises ValueError where record["answer"] is no one answer, or would not be taken for right in a box."""
    answer = record["answer"]
    if type(answer) not in (str, int, float) or (isinstance(answer, float) and not math.isfinite(answer)):
        raise ValueError(f"answer is {shown(answer)}; needed: one answer, a text or a number")
    if not mathematics(record, f"\\boxed{{{answer}}}")["correct"]:
        raise ValueError(f"answer {shown(answer)} is not right when it is the response; do its braces match?")


def _equal(gold: str, answer: str) -> bool:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at every call that we keep the time
    golds = parse(f"${gold}$", parsing_timeout=None) or parse(gold, parsing_timeout=None)
    found = parse(answer, parsing_timeout=None)
    return bool(golds and found and verify(golds, found, timeout_seconds=None))
