"""Between text and tokens: prompts, stop texts, responses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SLACK_TOKENS = 4  # that may add no byte to a text, as the first piece of a sequence


class StopTexts:
    """Does a response end with one of these texts, whatever tokens they are made of?"""

    def __init__(self, tokenizer: Any, texts: Sequence[str]):
        self.tokenizer, self.texts = tokenizer, list(texts)
        self.window = max(len(text.encode()) for text in texts) + SLACK_TOKENS  # tokens: each is at least one byte

    def reached(self, tokens: Sequence[int]) -> bool:
        """Is a text complete, special tokens included? Asked after every token, it looks at the end alone."""
        tail = self.tokenizer.decode(list(tokens[-self.window :]), clean_up_tokenization_spaces=False)
        return any(text in tail for text in self.texts)


def without_eos(ids: list[int], tokenizer: Any) -> list[int]:
    """A prompt's tokens without the end-of-sequence token that some tokenizers put after every text."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Tokens as they are, spaces included, without special tokens."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def response_text(tokenizer: Any, tokens: Sequence[int], stop: Sequence[str]) -> str:
    """The response before the first of the stop texts."""
    text = decode(tokenizer, tokens)
    ends = [text.index(mark) for mark in stop if mark in text]
    return text[: min(ends)] if ends else text


def read_eos(hf: str | Path) -> tuple[int, ...]:
    """End-of-sequence tokens that a Hugging Face directory's generation_config.json or config.json name."""
    for name in ("generation_config.json", "config.json"):
        file = Path(hf) / name
        named = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        if named is not None:
            return tuple(named) if isinstance(named, list) else (named,)
    return ()


def stop_tokens(sampling: Any, tokenizer: Any | None, eos: Sequence[int] = ()) -> set[int]:
    """Tokens that end a response: those asked for, and the end-of-sequence tokens unless these are ignored."""
    ends = set(sampling.stop_ids)
    if not sampling.ignore_eos:
        ends |= set(eos)
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            ends.add(int(tokenizer.eos_token_id))
    return ends
