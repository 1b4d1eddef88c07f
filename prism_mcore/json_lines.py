"""JSON Lines from outside, checked whole where they are opened: what is read can also be written and encoded."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from prism_mcore.text import check_text

SHOWN = 60  # characters of a value in a message


class Line(NamedTuple):
    """`Line(3, 1184, {"prompt": "1+1=", "answer": "2"})`."""

    number: int  # from 1, as editors count
    offset: int  # bytes before it
    record: dict[str, Any]


class JsonLines:
    """The objects of a file, line by line; `blank` counts the lines so far that hold nothing and are skipped.

    Raises ValueError that names file and line for a line that is no JSON object, and the field for a value that JSON
    has no word for (NaN, Infinity) or no encoding (half of a surrogate pair); OSError where the file cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path, self.blank = Path(path), 0

    def __iter__(self) -> Iterator[Line]:
        self.blank, offset = 0, 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        record = parse_object(line)
                    except ValueError as error:
                        raise ValueError(f"{self.path}, line {number}: {error}") from error
                    yield Line(number, offset, record)
                else:
                    self.blank += 1
                offset += len(line)


def parse_object(line: bytes | str) -> dict[str, Any]:
    """The object that a line holds; ValueError as JsonLines, without file and line."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError:
        raise ValueError("not JSON that can be read: it is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"{shown(record)}; needed: a JSON object")
    try:
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:  # UnicodeEncodeError is one
        raise ValueError("; ".join(_unwritable(record, ""))) from None
    return record


def shown(value: Any) -> str:
    """The beginning of a value, for a message."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _unwritable(value: Any, place: str) -> Iterator[str]:
    """What cannot be written of a value, with the field it is in."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _unwritable(key, f"a name of {place or 'the object'}")
            yield from _unwritable(inner, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _unwritable(inner, f"{place}[{index}]")
    elif isinstance(value, str):
        try:
            check_text(value)
        except ValueError as error:
            yield f"{place} holds {error}"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{place} is {value}, which JSON has no number for; give a finite number, a text or null"
