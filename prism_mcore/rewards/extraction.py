"""Which answer a response gives, and in what form: as it was asked for (strict), otherwise (lenient), or none.

Only what follows the reasoning is looked at; the extractor `whole` alone also looks inside it.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from prism_mcore.rewards.choice import chosen_letter
from prism_mcore.rewards.code import last_block
from prism_mcore.rewards.format import boxes
from prism_mcore.rewards.math import stated_answers
from prism_mcore.text import CLOSE, OPEN

_PYTHON = re.compile(r"^(?:def|class|import|from|for|while|if|print\()|\A\s+(?:return|for|while|if)\b", re.M)
KINDS = ("strict", "lenient", "none")


class Extraction(NamedTuple):
    """`Extraction("strict", "204")`; what is extracted is for people and for majorities, the reward reads the text."""

    kind: str
    answer: str | None


def extract(reward: str, response: str, extractor: str = "lenient") -> tuple[Extraction, str]:
    """What a response answers, and the text that its reward is to grade."""
    answer = response.replace(OPEN, "\n").replace(CLOSE, "\n") if extractor == "whole" else answer_of(response)
    answer = answer if reward == "code" else answer.strip()  # a function's body begins with spaces
    found = _EXTRACTIONS.get(reward, _as_it_stands)(answer)
    if found.kind == "none" or (extractor == "strict" and found.kind != "strict"):
        return Extraction("none", None), ""
    return found, f"```python\n{answer}\n```" if reward == "code" and found.kind == "lenient" else answer


def answer_of(response: str) -> str:
    """What follows the reasoning; nothing where it does not end, and not what follows where it begins again."""
    if OPEN in response and CLOSE not in response:
        return ""
    return response.rpartition(CLOSE)[2].split(OPEN)[0].strip("\n").rstrip()


def _math(answer: str) -> Extraction:
    stated = stated_answers(answer) if answer else []
    if not any(stated):
        return Extraction("none", None)
    return Extraction("strict" if boxes(answer) else "lenient", next(filter(None, stated)))


def _choice(answer: str) -> Extraction:
    letter = chosen_letter(answer)
    if letter is None:
        return Extraction("none", None)
    boxed = boxes(answer)
    return Extraction(
        "strict" if boxed and chosen_letter(answer[boxed[-1][0] : boxed[-1][2]]) == letter else "lenient", letter
    )


def _code(answer: str) -> Extraction:
    if (block := last_block(answer)) is not None:
        return Extraction("strict", block)
    return Extraction("lenient", answer) if "```" not in answer and _PYTHON.search(answer) else Extraction("none", None)


def _as_it_stands(answer: str) -> Extraction:
    found = boxes(answer)
    if found and found[-1][1].strip():
        return Extraction("strict", found[-1][1].strip())
    return Extraction("lenient", answer) if answer else Extraction("none", None)


_EXTRACTIONS: Mapping[str, Callable[[str], Extraction]] = {"math": _math, "choice": _choice, "code": _code}
