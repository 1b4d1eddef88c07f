"""What a response looks like: its reasoning in <think> tags, its final answer, how it ends, how it repeats itself."""

import re
from collections.abc import Sequence

from prism_mcore.text import CLOSE, OPEN

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"(?<!\\)[{}]")


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
    r"""The content of the last \boxed{...} or \fbox{...}, braces matched, of the innermost where they nest, or None."""
    found = boxes(text)
    return found[-1][1] if found else None


def boxes(text: str) -> list[tuple[int, str, int]]:
    """(start, content, end) of every outermost box, the content of the last inside it; without matching braces none."""
    closing, opened = {}, []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened:
            closing[opened.pop()] = brace.start()
    found: list[tuple[int, str, int]] = []
    for match in _BOX.finditer(text):
        end = closing.get(match.end() - 1)
        if end is None:
            continue
        content = text[match.end() : end] if not _BOX.search(text, match.end(), end) else ""
        if found and match.start() < found[-1][2]:
            found[-1] = (found[-1][0], content, found[-1][2])  # inside the one before
        else:
            found.append((match.start(), content, end + 1))
    return found


def repeated_fraction(tokens: Sequence[int], ngram: int) -> float:
    """Share of a response's n-grams that occurred in it before, in [0, 1]; 0 where it is shorter than one n-gram."""
    count = len(tokens) - ngram + 1
    if count < 1:
        return 0.0
    return 1.0 - len({tuple(tokens[i : i + ngram]) for i in range(count)}) / count
