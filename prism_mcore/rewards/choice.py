"""Multiple choice: which letter does the response settle on?"""

import re
from collections.abc import Mapping
from typing import Any

from prism_mcore.json_lines import shown
from prism_mcore.rewards.format import boxed, final_answer

# A small letter, or I, that a word follows is English: "the answer is a prime number", "the answer I found".
_ANSWER = re.compile(r"(?i:answer\s*(?:is)?)\s*:?\s*\**\s*\(?((?!I\s+\w)[A-J]|[a-j](?!\s+\w))\b")
_LONE = re.compile(r"^[^\w\n]*([A-J])[^\w\n]*$|\(([A-J])\)|^([A-J])[.):]", re.MULTILINE)


def choice(record: Mapping[str, Any], response: str) -> dict[str, float]:
    """correct = 1 where the letter chosen is record["answer"]: the last boxed one, "answer: X", or a lone letter."""
    chosen = chosen_letter(final_answer(response))
    return {"correct": float(chosen is not None and chosen == str(record["answer"]).strip().strip("()").upper())}


def check(record: Mapping[str, Any]) -> None:
    """Raises ValueError where record["answer"] is no letter that a response could choose."""
    answer = record["answer"]
    if not isinstance(answer, str) or not choice(record, f"\\boxed{{{answer}}}")["correct"]:
        raise ValueError(f"answer is {shown(answer)}; needed: the letter of the right choice, A to J")


def chosen_letter(answer: str) -> str | None:
    """The letter A to J that an answer settles on, or None."""
    inside = boxed(answer)
    if inside is not None:
        letter = re.sub(r"\\text\w*|[{}().\s]", "", inside)
        return letter.upper() if re.fullmatch(r"[A-Ja-j]", letter) else None
    # A run of white space is one character: the patterns would try every way to share it out.
    answer = "\n".join(" ".join(line.split()) for line in answer.splitlines() if line.strip())
    if found := _ANSWER.findall(answer):
        return found[-1].upper()
    if found := _LONE.findall(answer):
        return next(letter for letter in found[-1] if letter)
    return None
