"""Files of a scoring run: sequences of token ids in, log-probabilities and logits out. No torch in here."""

from __future__ import annotations

import json
import math
import os
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def read_token_lists(path: str | os.PathLike[str], vocab_size: int) -> list[list[int]]:
    """Sequences of one length from a JSON list of lists of token ids; a ValueError says which sequence is wrong."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bytes that are no text, or brackets without end, too
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError(f"{path}: needed: a JSON list of lists of token ids, such as [[5, 6, 7], [9, 3, 4]]")
    if not rows or len(rows[0]) < 2:
        found = f"sequence 0 has {len(rows[0])} tokens" if rows else "there is no sequence"
        raise ValueError(f"{path}: {found}; needed: sequences of at least 2 tokens, to score one after another")
    for index, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(
                f"{path}: sequence {index} has {len(row)} tokens, sequence 0 has {len(rows[0])}; make all one length,"
                " or score each length from a file of its own"
            )
        for position, token in enumerate(row):
            if type(token) is not int or not 0 <= token < vocab_size:
                raise ValueError(
                    f"{path}: token {position} of sequence {index} is {json.dumps(token)};"
                    f" needed: an id from 0 to {vocab_size - 1}, the model's vocabulary"
                )
    return rows


def shapes_of(n: int, length: int, vocab_size: int, logits: bool) -> dict[str, tuple[int, ...]]:
    """Tensors of the scores of n sequences."""
    return {"logprobs": (n, length - 1)} | ({"logits": (n, length, vocab_size)} if logits else {})


class ScoreFile:
    """A safetensors file of fp32 tensors that ranks fill at the same time, row by row, under a temporary name.

    Every rank opens it with the same shapes; one calls `create` before any rank writes and, when all have closed it,
    `publish`. Nothing is held in memory, and a full disk is noticed before the first row.
    """

    def __init__(self, path: str | os.PathLike[str], shapes: dict[str, tuple[int, ...]]):
        self.path, self.part = Path(path), Path(f"{path}.part")
        self.row_bytes = {name: 4 * math.prod(shape[1:]) for name, shape in shapes.items()}
        ends = list(accumulate((4 * math.prod(shape) for shape in shapes.values()), initial=0))
        table = {
            name: {"dtype": "F32", "shape": shape, "data_offsets": offsets}
            for (name, shape), offsets in zip(shapes.items(), pairwise(ends), strict=True)
        }
        text = json.dumps(table).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.starts = {name: len(self.header) + start for name, start in zip(shapes, ends, strict=False)}
        self.size = len(self.header) + ends[-1]
        self.file: int | None = None

    def create(self) -> None:
        """Reserve the space and write the header; an OSError where the space is not there."""
        file = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.posix_fallocate(file, 0, self.size)
            os.pwrite(file, self.header, 0)
        except OSError as error:
            self.part.unlink()
            raise OSError(
                error.errno, f"{os.strerror(error.errno or 0)} ({self.size:,} bytes)", str(self.path)
            ) from error
        finally:
            os.close(file)

    def write(self, name: str, row: int, values: Tensor) -> None:
        """Put `values` [...] into row `row` of a tensor."""
        if self.file is None:
            self.file = os.open(self.part, os.O_RDWR)
        data = memoryview(values.contiguous().numpy()).cast("B")
        assert len(data) == self.row_bytes[name], "a row is what the shape says"
        offset = self.starts[name] + row * len(data)
        while data:
            done = os.pwrite(self.file, data, offset)  # at most 2 GiB at a time
            data, offset = data[done:], offset + done

    def close(self) -> None:
        """Flush what this rank wrote."""
        if self.file is not None:
            os.fsync(self.file)
            os.close(self.file)
            self.file = None

    def publish(self) -> None:
        """Give the complete file its name."""
        os.replace(self.part, self.path)
