"""Multiple choice: which letter does the response settle on?"""

import re
from collections.abc import Mapping
from typing import Any

from prism_mcore.json_lines import shown
from prism_mcore.rewards.format import boxes, final_answer

# What may stand around a letter: Markdown, LaTeX, quotes, brackets.
_FONT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mbox|operatorname|bf|rm)\s*\*?\s*\{([^{}]*)\}")
_WRAPPING = re.compile(r"[*_`$\"\u201c\u201d]|(?<!\w)['\u2018\u2019]|['\u2019](?!\w)|\\[()\[\]]|</?answer>", re.I)
_OPTION = r"(?:(?i:the\s+)?(?i:option|choice|answer|letter)\s+)?"
_LETTER = r"[(\[{<]?\s*([A-J])\s*[)\]}>]?"
# A statement: "the answer is B", "answer: (B)", "the correct option is B", "the best choice must be B", "option B".
_STATED = re.compile(
    r"(?:(?i:\b(?:answer|option|choice|letter|one|statement))\b\s*(?:(?i:is|must\s+be|should\s+be|would\s+be|will\s+be)\b)?\s*[:=]*\s*)"
    + _OPTION
    + r"(?:[(\[{<]?\s*(?:([A-J])|([a-j])(?!\s+\w))\s*[)\]}>]?)(?![\w=^+*/'\u2019-])(?!\s*[=^+/<>])"
)
_MORE = re.compile(r"\s*(?:,|;|/|&|(?i:and|or|nor|and/or)\b)\s*" + _OPTION + _LETTER + r"(?!\w)")
_DENIED = re.compile(
    r"\s*(?:is|was|are|must be)\s+(?:wrong|incorrect|false|not|out|eliminated|ruled)\b"
)  # "answer A is wrong"
_ENGLISH_I = re.compile(r"^\s+(?:[a-z]\w*)")  # "the answer I found"
_LEADING = re.compile(_OPTION + _LETTER + r"\s*(?:[.:,)\]-].*|\s+.*)?", re.S)
_LONE = re.compile(r"^[^\w\n]*" + _OPTION + r"[(\[{<]?([A-J])[)\]}>]?[^\w\n]*$|\(([A-J])\)|^([A-J])[.):]", re.M)


def choice(record: Mapping[str, Any], response: str) -> dict[str, float]:
    """correct = 1 where the letter that the response settles on is record["answer"]."""
    chosen = chosen_letter(final_answer(response))
    return {"correct": float(chosen is not None and chosen == str(record["answer"]).strip().strip("()").upper())}


def check(record: Mapping[str, Any]) -> None:
    """Raises ValueError where record["answer"] is no letter that a response could choose."""
    answer = record["answer"]
    if not isinstance(answer, str) or not choice(record, f"\\boxed{{{answer}}}")["correct"]:
        raise ValueError(f"answer is {shown(answer)}; needed: the letter of the right choice, A to J")


def chosen_letter(answer: str) -> str | None:
    """The letter A to J that an answer settles on: the last explicit statement of one, boxed or in words.

    Two letters in it are none; without any statement the last letter that stands alone counts.
    """
    found = [(start, _of_box(content)) for start, content, _ in boxes(answer)]
    outside = answer
    for start, _, end in boxes(answer):
        outside = outside[:start] + " " * (end - start) + outside[end:]
    plain, places = _plain(outside)
    for match in _STATED.finditer(plain):
        letter = match[1] or match[2].upper()
        rest = plain[match.end() :]
        if _DENIED.match(rest) or (letter == "I" and _ENGLISH_I.match(rest)):
            continue
        found.append((places[match.start()], None if _MORE.match(rest) else letter))
    stated = [each for each in sorted(found) if each[1] != ""] if found else []
    if stated:
        return stated[-1][1]
    if any(letter == "" for _, letter in found):
        return None  # a box that holds no letter, and nothing else was said
    lone = [next(letter for letter in match if letter) for match in _LONE.findall(plain)]
    return lone[-1] if lone else None


def _of_box(content: str) -> str | None:
    """The letter that a box holds, alone or before its text; "" where it holds none, None where it holds two."""
    plain, _ = _plain(content)
    match = _LEADING.fullmatch(plain.strip())
    if not match:
        small = re.fullmatch(r"[(\[{]?([a-j])[)\]}]?[.:]?", plain.strip())
        return small[1].upper() if small else ""
    rest = plain.strip()[match.end(1) :].lstrip(")]}> ")
    return None if _MORE.match(rest) else match[1]


def _plain(text: str) -> tuple[str, list[int]]:
    """The text without fonts, wrapping and runs of white space, and where in it each character stood."""
    while font := _FONT.search(text):
        content = font[1]
        text = text[: font.start()] + content.ljust(len(font[0])) + text[font.end() :]
    text = _WRAPPING.sub(lambda match: " " * len(match[0]), text)
    kept: list[str] = []
    places: list[int] = []
    for place, sign in enumerate(text):
        if sign.isspace():
            sign = "\n" if sign == "\n" else " "
            if kept and kept[-1] in " \n":  # a run is one character: patterns would try every way to share it out
                kept[-1] = max(kept[-1], sign, key=" \n".index)
                continue
        kept.append(sign)
        places.append(place)
    return "".join(kept), [*places, len(text)]
