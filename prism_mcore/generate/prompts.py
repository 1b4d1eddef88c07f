"""Prompt files in, response files out: what launch/generate.py reads, checks and writes."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_mcore.generate.requests import Completion, Request
from prism_mcore.generate.settings import Sampling
from prism_mcore.json_lines import JsonLines, shown
from prism_mcore.model.spec import ModelSpec
from prism_mcore.text import Tokenizer, check_text, load_tokenizer, response_text


@dataclass(frozen=True)
class PromptLine:
    """One line of a prompt file: its object, to be written back beside each response, and the prompt's tokens."""

    record: dict[str, Any]
    tokens: tuple[int, ...]


def tokenizer_of(hf: str | Path, spec: ModelSpec) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory, None where it has none; a ValueError where it is another model's."""
    if not (Path(hf) / "tokenizer.json").is_file():
        return None
    tokenizer = load_tokenizer(hf)
    tokenizer.check_fits(spec.vocab_size, "put the model's own tokenizer there")
    return tokenizer


def read_prompts(path: str | Path, tokenizer: Tokenizer | None, spec: ModelSpec) -> tuple[list[PromptLine], int]:
    """Every prompt of a JSONL file whose objects have `prompt` (text) or `tokens` (ids), and how many lines were blank.

    Raises ValueError that names file and line for one that is no JSON object, has neither or both, is empty, leaves no
    position for a response, or holds a token that the model does not know; for what JsonLines refuses; and for text
    without a tokenizer.
    """
    file, lines = JsonLines(path), []
    for number, _, record in file:
        try:
            lines.append(_prompt(record, tokenizer, spec))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not lines:
        raise ValueError(f"{path} has no prompts; needed: one JSON object with `prompt` or `tokens` per line")
    return lines, file.blank


def _prompt(record: dict[str, Any], tokenizer: Tokenizer | None, spec: ModelSpec) -> PromptLine:
    if ("prompt" in record) == ("tokens" in record):
        found = ", ".join(sorted(record)) or "nothing"
        raise ValueError(f"an object with {found}; needed: an object with either `prompt` (text) or `tokens` (ids)")
    if "tokens" in record:
        tokens = prompt_tokens(record["tokens"])
    elif not isinstance(record["prompt"], str):
        raise ValueError(f"prompt is {shown(record['prompt'])}; needed: a text")
    else:
        tokens = text_tokens(record["prompt"], tokenizer)
    problem = prompt_problem(tokens, spec.vocab_size, spec.max_positions)
    if problem:
        raise ValueError(f"the prompt {problem}")
    return PromptLine(record, tokens)


def text_tokens(text: str, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The tokens of a text. Raises ValueError where it cannot be encoded."""
    if tokenizer is None:
        raise ValueError("the prompt is text, and there is no tokenizer (tokenizer.json); give token ids instead")
    return tuple(tokenizer.encode(check_text(text))) if text else ()


def prompt_tokens(ids: Any) -> tuple[int, ...]:
    """Token ids as they are: whole numbers in a list, a tuple or an array. Raises ValueError for anything else."""
    listed = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(listed, list | tuple) or not all(type(token) is int for token in listed):
        raise ValueError(f"tokens is {shown(listed)}; needed: a list of token ids")
    return tuple(listed)


def prompt_problem(tokens: Sequence[int], vocab_size: int, context: int) -> str | None:
    """What is wrong with a prompt, or None."""
    if not len(tokens):
        return "is empty; needed: at least one token"
    if strange := [token for token in tokens if type(token) is not int]:
        return f"holds {strange[0]!r}; needed: token ids, whole numbers"
    if len(tokens) >= context:
        return f"has {len(tokens):,} tokens; needed: fewer than the model's {context:,} positions, to leave one to fill"
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= vocab_size:
        return f"holds token {low if low < 0 else high}; needed: ids from 0 to {vocab_size - 1}, the model's vocabulary"
    return None


def requests_of(
    lines: Sequence[PromptLine], sampling: Sampling, done: Collection[tuple[int, int]], replica: int, replicas: int
) -> list[Request]:
    """This replica's requests for all samples but those done; the line and the sample's number are in their keys."""
    keys = [
        [(sampling.seed, 0, n, sample) for sample in range(sampling.samples) if (n, sample) not in done]
        for n in range(len(lines))
    ]
    left = [n for n in range(len(lines)) if keys[n]]
    return [Request(lines[n].tokens, tuple(keys[n])) for n in left[replica::replicas]]


def response_lines(
    lines: Sequence[PromptLine],
    completions: dict[tuple[int, int], Completion],
    tokenizer: Tokenizer | None,
    how: Sampling,
) -> Iterator[str]:
    """One JSON line per sample, in the order of the file; `completions` by (line, sample)."""
    for (number, _), completion in sorted(completions.items()):
        answer: dict[str, Any] = {}
        if tokenizer is not None:
            answer["response"] = response_text(tokenizer, completion.tokens, how.stop)
        answer |= {
            "response_tokens": list(completion.tokens),
            "logprobs": [float(x) for x in completion.logprobs],
            "finish_reason": completion.finish,
        }
        yield json.dumps(lines[number].record | answer, ensure_ascii=False) + "\n"
