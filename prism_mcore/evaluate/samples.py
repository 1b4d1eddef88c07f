"""Generations that are kept: OUT/<task>.samples, a line each, written as they finish and never thrown away.

A sample belongs to a question, whatever line it is in today, and to its number; both and the prompt's hash are in its
line. The first line says what all of them have in common, model and sampling; samples of another are refused.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from prism_mcore.generate import unfinished
from prism_mcore.generate.requests import Completion
from prism_mcore.text import CLOSE, Tokenizer, before_stop, in_reasoning

Place = tuple[str, int]  # (key of a question, sample)


@dataclass(frozen=True)
class Sample:
    """One generation, as its line has it."""

    question: str  # id
    key: str  # of the question: Problem.key
    sample: int
    prompt: str  # hash of its tokens
    response: str  # with special tokens, without the token or text that ended it
    tokens: list[int]
    logprob: float  # mean over tokens of the log-probability at sampling
    finish: str  # stop, length, context
    in_think: bool  # the prompt ends inside <think>

    @property
    def place(self) -> Place:
        return self.key, self.sample

    @property
    def truncated(self) -> bool:
        return self.finish != "stop"

    @property
    def text(self) -> str:
        """The response with the opening of its reasoning, where the prompt has that."""
        return f"<think>{self.response}" if self.in_think else self.response


def prompt_hash(tokens: Sequence[int]) -> str:
    return hashlib.sha256(",".join(map(str, tokens)).encode()).hexdigest()[:16]


def response_of(tokenizer: Tokenizer, completion: Completion, prompt: str, stop: Sequence[str]) -> str:
    """A response as it is kept: cut at the first of the stop texts behind its reasoning."""
    tokens = completion.tokens[:-1] if completion.stop_token else completion.tokens
    response = tokenizer.decode(tokens, special=True)
    if in_reasoning(prompt + response):
        return response
    reasoning, close, answer = response.rpartition(CLOSE)
    return reasoning + close + before_stop(answer, stop)


class Writer(unfinished.Writer):
    """Writes one rank's samples as they finish."""

    def __enter__(self) -> Self:
        return self

    def keep(self, sample: Sample) -> None:
        self.write(asdict(sample))


def read(out: Path, case: Mapping[str, Any]) -> dict[Place, Sample]:
    """All samples of a task so far. Raises ValueError for those of another case, and for a broken line."""
    found = {}
    for file in unfinished.files(out):
        for number, record in unfinished.lines(file, out, dict(case)):
            try:
                sample = Sample(**record)
            except TypeError as error:
                raise unfinished.broken(file, number, out, error) from error
            found[sample.place] = sample
    return found


def take_over(out: Path, case: Mapping[str, Any], samples: Iterable[Sample]) -> None:
    """Put them into one file in place of all: for one process, while no other writes."""
    earlier, new = unfinished.files(out), Path(f"{out}.samples.new")
    with Writer(out, 0, dict(case), new) as writer:
        for sample in samples:
            writer.keep(sample)
    os.replace(new, f"{out}.samples")
    for file in earlier:
        if file != Path(f"{out}.samples"):
            file.unlink()
