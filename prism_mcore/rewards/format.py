"""What a response looks like: its reasoning in <think> tags, its final answer, how it ends, how it repeats itself."""

import re
from collections.abc import Sequence

OPEN, CLOSE = "<think>", "</think>"


def is_formatted(response: str) -> bool:
    """Is this `<think>...</think>` and then an answer, each tag once? PRISM (arXiv 2603.17074) counts no other."""
    if response.count(OPEN) != 1 or response.count(CLOSE) != 1:
        return False
    before, rest = response.split(OPEN)
    _, close, answer = rest.partition(CLOSE)
    return not before.strip() and bool(close) and bool(answer.strip())


def final_answer(response: str) -> str:
    """What follows the reasoning, or all of a response without any; "" where the reasoning does not end."""
    if OPEN in response and CLOSE not in response:
        return ""
    return response.rsplit(CLOSE, 1)[-1].strip()


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, braces matched, or None."""
    starts = [match.end() for match in re.finditer(r"\\boxed\s*\{", text)]
    if not starts:
        return None
    depth, start = 1, starts[-1]
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None


def repeated_fraction(tokens: Sequence[int], ngram: int) -> float:
    """Share of a response's n-grams that occurred in it before, in [0, 1]; 0 where it is shorter than one n-gram."""
    count = len(tokens) - ngram + 1
    if count < 1:
        return 0.0
    return 1.0 - len({tuple(tokens[i : i + ngram]) for i in range(count)}) / count
