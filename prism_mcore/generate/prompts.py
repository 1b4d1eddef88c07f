"""Prompt files in, response files out: what launch/generate.py reads, checks and writes."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_mcore.config import Settings, load, resolve_spec, validate_generation
from prism_mcore.generate.engine import prompt_problem
from prism_mcore.generate.requests import Completion, Request
from prism_mcore.generate.settings import Sampling
from prism_mcore.model.spec import ModelSpec
from prism_mcore.text import Tokenizer, load_tokenizer, response_text


@dataclass(frozen=True)
class PromptLine:
    """One line of a prompt file: its object, to be written back beside each response, and the prompt's tokens."""

    record: dict[str, Any]
    tokens: tuple[int, ...]


def generation_settings(hf: str | Path, overrides: Sequence[str], world_size: int | None) -> tuple[Settings, ModelSpec]:
    """Settings of a run that only generates, checked, and the model's shape.

    world_size: None stands for as many ranks as the layout needs. Raises SettingsError.
    """
    settings = load(None, [*overrides, f"model.init={json.dumps(str(hf))}"])
    spec = resolve_spec(settings)
    validate_generation(settings, spec, settings.parallel.tp if world_size is None else world_size)
    return settings, spec


def tokenizer_of(hf: str | Path, spec: ModelSpec) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory, None where it has none; a ValueError where it is another model's."""
    if not (Path(hf) / "tokenizer.json").is_file():
        return None
    tokenizer = load_tokenizer(hf)
    tokenizer.check_fits(spec.vocab_size, "put the model's own tokenizer there")
    return tokenizer


def read_prompts(path: str | Path, tokenizer: Tokenizer | None, spec: ModelSpec) -> list[PromptLine]:
    """Every prompt of a JSONL file whose objects have `prompt` (text) or `tokens` (ids).

    Raises ValueError that names file and line for one that is no JSON object, has neither or both, is empty, leaves no
    position for a response, or holds a token that the model does not know; and for text without a tokenizer.
    """
    lines = []
    with Path(path).open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                try:
                    lines.append(_prompt(raw, tokenizer, spec))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
    if not lines:
        raise ValueError(f"{path} has no prompts; needed: one JSON object with `prompt` or `tokens` per line")
    return lines


def _prompt(raw: bytes, tokenizer: Tokenizer | None, spec: ModelSpec) -> PromptLine:
    try:
        record = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(record, dict) or ("prompt" in record) == ("tokens" in record):
        found = f"an object with {', '.join(sorted(record)) or 'nothing'}" if isinstance(record, dict) else "no object"
        raise ValueError(f"{found}; needed: an object with either `prompt` (text) or `tokens` (ids)")
    tokens = _tokens(record, tokenizer)
    problem = prompt_problem(tokens, spec.vocab_size, spec.max_positions)
    if problem:
        raise ValueError(f"the prompt {problem}")
    return PromptLine(record, tokens)


def _tokens(record: dict[str, Any], tokenizer: Tokenizer | None) -> tuple[int, ...]:
    if "tokens" in record:
        ids = record["tokens"]
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise ValueError(f"tokens is {json.dumps(ids)[:60]}; needed: a list of token ids")
        return tuple(ids)
    text = record["prompt"]
    if not isinstance(text, str):
        raise ValueError(f"prompt is {json.dumps(text)[:60]}; needed: a text")
    if tokenizer is None:
        raise ValueError("the prompt is text, and the model's directory has no tokenizer.json; give `tokens` instead")
    return tuple(tokenizer.encode(text)) if text else ()


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
