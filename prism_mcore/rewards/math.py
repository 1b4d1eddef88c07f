"""Mathematical answers: which one a response settles on, compared with the right one as text or as an expression."""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from prism_mcore.json_lines import shown
from prism_mcore.rewards.expressions import same
from prism_mcore.rewards.format import boxes, final_answer

# "The final answer is 7.", "**Answer:** 7"; what follows goes to the end of the sentence or line.
_PHRASE = re.compile(
    r"(?i)\b(?:final\s+answer|answer|result|solution)\b[*_\s]*(?:is|are|equals|was|:|=)[*_\s:]*(.+?)(?=\.?[*_]*\s*$|\.\s)",
    re.M,
)
_HEDGED = re.compile(
    r"(?i)\b(?:answer|result|solution)\s+(?:could|might|may|can)\s+be\b|\b(?:maybe|perhaps|possibly)\b"
)
_JOINING = re.compile(r"(?i)[\s$,;]*(?:(?:\\text\{\s*)?\b(?:and|or)\b\s*\}?)?[\s$,;]*")


def mathematics(record: Mapping[str, Any], response: str) -> dict[str, float]:
    r"""correct = 1 where the final answer is record["answer"], else 0; expressions.py says when two are the same.

    The last \boxed{} counts where there is one, then what follows "the answer is", then what math-verify finds in the
    text after the reasoning. An empty box, and several answers where one is asked for, are none.
    """
    gold, answer = str(record["answer"]), final_answer(response)
    return {"correct": float(any(same(gold, stated) for stated in stated_answers(answer)))}


def check(record: Mapping[str, Any]) -> None:
    """Raises ValueError where record["answer"] is no one answer, or would not be taken for right in a box."""
    answer = record["answer"]
    if type(answer) not in (str, int, float) or (isinstance(answer, float) and not math.isfinite(answer)):
        raise ValueError(f"answer is {shown(answer)}; needed: one answer, a text or a number")
    if not mathematics(record, f"\\boxed{{{answer}}}")["correct"]:
        raise ValueError(f"answer {shown(answer)} is not right when it is the response; do its braces match?")


def stated_answers(answer: str) -> list[str]:
    """What an answer settles on, in the ways it can be read; empty where it settles on nothing."""
    if found := boxes(answer):
        parts = [found[-1]]
        for box in reversed(found[:-1]):  # \\boxed{2} or \\boxed{3} is one statement of two answers
            if not _JOINING.fullmatch(answer[box[2] : parts[0][0]]):
                break
            parts.insert(0, box)
        contents = [content.strip() for _, content, _ in parts]
        return [", ".join(contents)] if all(contents) else []
    if _HEDGED.search(answer):
        return []
    if phrases := _PHRASE.findall(answer):
        return [phrases[-1].strip()]
    if len(answer.splitlines()) <= 1 and len(answer) <= 200:
        return [answer, *_extracted(answer)] if not re.search(r"\b(?:or|and)\b|,", answer) else [answer]
    return _extracted(answer)


def _extracted(answer: str) -> list[str]:
    """The last expression that math-verify finds in a text, as it is written there."""
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at every call that we keep the time
    return [found for found in parse(answer, parsing_timeout=None)[-1:] if isinstance(found, str)]
