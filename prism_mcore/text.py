"""Between text and tokens: a model's tokenizer.json as it is, chats rendered, the tokens and texts that end a response.

Nothing here runs code of a model's directory: tokenizer.json is read by the tokenizers library, never through a class
that its neighbours name, and chat templates run in transformers' sandbox.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

OPEN, CLOSE = "<think>", "</think>"  # around a response's reasoning
SLACK_TOKENS = 4  # that may add no byte to a text, as the first piece of a sequence
_ROLES = {"user": "User: ", "assistant": "Assistant: ", "system": ""}
_OTHER_FORMATS = ("tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model", "tiktoken.model")


class Tokenizer:
    """What one tokenizer.json says, whatever lies beside it.

    backend: never truncates or pads. named: {"bos_token": "<s>", "eos_token": "</s>", ...}, the special tokens that the
    files beside it name. eos_id: the token that ends every text, None where none is named. end_ids: all that end a
    response. sha256: of the file.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        named: Mapping[str, str] | None = None,
        *,
        eos_id: int | None = None,
        end_ids: Iterable[int] = (),
        chat_template: str | None = None,
        source: str = "the tokenizer",
        sha256: str | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.named, self.chat_template, self.source = backend, dict(named or {}), chat_template, source
        self.sha256 = sha256 or hashlib.sha256(backend.to_str().encode()).hexdigest()
        self.eos_id = self.id_of(self.named["eos_token"]) if "eos_token" in self.named else eos_id
        self.end_ids = frozenset(end_ids) | ({self.eos_id} if self.eos_id is not None else frozenset())

    @classmethod
    def of(cls, tokenizer: Any) -> "Tokenizer":
        """The tokenizer itself, or what stands behind a fast tokenizer of transformers."""
        if isinstance(tokenizer, cls):
            return tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise ValueError(
                f"a tokenizer is a {type(tokenizer).__name__}; needed: what prism_mcore.text.load_tokenizer gives, or a"
                " fast tokenizer of transformers"
            )
        named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        copy = tokenizers.Tokenizer.from_str(backend.to_str())
        return cls(copy, named, eos_id=tokenizer.eos_token_id, chat_template=tokenizer.chat_template)

    @cached_property
    def json(self) -> str:
        """The tokenizer as text, which processes can be given."""
        return self.backend.to_str()

    @cached_property
    def size(self) -> int:
        """The largest id + 1: what ids stay below. A vocabulary with gaps has fewer tokens than that."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no text: those that tokenizer.json marks, and those that the files beside it name."""
        marked = {number for number, token in self.backend.get_added_tokens_decoder().items() if token.special}
        named = map(self.id_of, self.named.values())
        return frozenset(marked.union(number for number in named if number is not None))

    def id_of(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def check_fits(self, vocab_size: int, advice: str) -> None:
        """Raises ValueError, ending with `advice`, where it has ids that a model's vocabulary does not."""
        if self.size > vocab_size:
            count = self.backend.get_vocab_size(with_added_tokens=True)
            reach = "" if count == self.size else f" with ids up to {self.size - 1:,}"
            raise ValueError(
                f"{self.source}: the tokenizer has {count:,} tokens{reach}, the model's vocabulary {vocab_size:,}: they"
                f" do not belong together; {advice}"
            )

    def encode(self, text: str) -> list[int]:
        """A prompt's tokens: with what tokenizer.json puts in front (BOS), without the end token it may put behind.

        Special tokens written in the text become these tokens.
        """
        return self.encode_batch([text])[0]

    def encode_plain(self, text: str) -> list[int]:
        """The text's own tokens, with nothing in front."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts))] if texts else []
        return [ids[:-1] if len(ids) > 1 and ids[-1] == self.eos_id else ids for ids in encoded]

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """Tokens as they are, spaces included. special: the special tokens, too."""
        chosen = list(tokens) if special else [token for token in tokens if token not in self.special_ids]
        return self.backend.decode(chosen, skip_special_tokens=False)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **more: Any) -> str:
        """A chat as the model's own template writes it; `more` reaches the template by name (tools, documents, ...).

        Raises ValueError where there is no template, or it refuses the chat.
        """
        if self.chat_template is None:
            raise ValueError(f"{self.source} has no chat template (chat_template.jinja, or in tokenizer_config.json)")
        from transformers.utils.chat_template_utils import render_jinja_template  # its sandbox; takes a second

        try:
            (text,), _ = render_jinja_template(
                [[dict(message) for message in messages]],
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                **self.named,
                **more,
            )
        except Exception as error:  # a program of others: it can raise anything
            raise ValueError(f"{self.source}: its chat template: {error or type(error).__name__}") from error
        return text

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> list[int]:
        """Tokens of a rendered chat. The template writes BOS itself, nothing is added."""
        return self.encode_plain(self.render(messages, **more))


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a Hugging Face directory.

    Its eos_id is the eos_token that tokenizer_config.json (or special_tokens_map.json) names, else the one token that
    generation_config.json or config.json names. Raises ValueError, naming the file, where there is no tokenizer.json or
    a file is broken.
    """
    place = Path(folder)
    file = place / "tokenizer.json"
    if not place.is_dir():
        raise ValueError(f"{place}: no such tokenizer directory")
    if not file.is_file():
        others = [name for name in _OTHER_FORMATS if (place / name).is_file()]
        advice = (
            f"it has {', '.join(others)}, which is another format: write tokenizer.json once, with"
            f" transformers.AutoTokenizer.from_pretrained({str(place)!r}).save_pretrained({str(place)!r})"
            if others
            else "give the directory of the model's tokenizer"
        )
        raise ValueError(f"{place} has no tokenizer.json (no fast tokenizer); {advice}")
    try:
        content = file.read_bytes()
        backend = tokenizers.Tokenizer.from_buffer(content)
    except OSError:
        raise
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"{file} is no tokenizer: {error}; get it again") from error
    named = _named_tokens(place)
    eos = read_eos(place)
    tokenizer = Tokenizer(
        backend,
        named,
        eos_id=eos[0] if len(eos) == 1 else None,
        end_ids=eos,
        chat_template=_chat_template(place),
        source=str(place),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    if "eos_token" in named and tokenizer.eos_id is None:
        raise ValueError(f"{place}: eos_token is {named['eos_token']!r}, which tokenizer.json does not hold; mend it")
    if tokenizer.size == 0:
        raise ValueError(f"{file}: its vocabulary is empty; get it again")
    return tokenizer


def read_eos(folder: str | os.PathLike[str]) -> tuple[int, ...]:
    """End-of-sequence tokens that a directory's generation_config.json names, or, where it names none, config.json.

    Raises ValueError, naming the file, where one cannot be read or names something else than token ids.
    """
    named = [_eos_of(Path(folder) / name) for name in ("generation_config.json", "config.json")]
    return next(filter(None, named), ())


def end_tokens(folders: Iterable[str | os.PathLike[str]], tokenizer: Tokenizer | None = None) -> tuple[int, ...]:
    """Every token that ends a response: those that the folders' configs and tokenizers name, and the tokenizer's own.

    A model and its tokenizer may lie in two folders, and each know some. Raises ValueError as read_eos.
    """
    ends: set[int | None] = set()
    for folder in map(Path, folders):
        ends |= set(read_eos(folder))
        if tokenizer is not None and "eos_token" in (named := _named_tokens(folder)):
            ends.add(tokenizer.id_of(named["eos_token"]))
    if tokenizer is not None:
        ends.add(tokenizer.eos_id)
    return tuple(sorted(token for token in ends if token is not None))


def stop_tokens(sampling: Any, tokenizer: Tokenizer | None, eos: Sequence[int] = ()) -> set[int]:
    """Tokens that end a response: those asked for, and the end-of-sequence tokens unless these are ignored."""
    ends = set(sampling.stop_ids)
    if not sampling.ignore_eos:
        ends |= set(eos)
        if tokenizer is not None:
            ends |= tokenizer.end_ids
    return ends


class StopTexts:
    """Does a response end with one of these texts, whatever tokens they are made of?"""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]):
        self.tokenizer, self.texts = tokenizer, list(texts)
        self.window = max(len(text.encode()) for text in texts) + SLACK_TOKENS  # tokens: each is at least one byte

    def reached(self, tokens: Sequence[int]) -> bool:
        """Is a text complete, special tokens included? Asked after every token, it looks at the end alone."""
        tail = self.tokenizer.decode(tokens[-self.window :], special=True)
        return any(text in tail for text in self.texts)

    def reached_after_think(self, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
        """Is a text complete behind the reasoning, which the prompt may have begun? Decodes all: for `reached`."""
        begun = self.tokenizer.decode(prompt[-self.window :], special=True)
        response = self.tokenizer.decode(tokens, special=True)
        answer = response.rpartition(CLOSE)[2]
        return not in_reasoning(begun + response) and any(text in answer for text in self.texts)


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop texts."""
    ends = [text.index(mark) for mark in stop if mark in text]
    return text[: min(ends)] if ends else text


def in_reasoning(text: str) -> bool:
    """Has reasoning begun in a text and not ended?"""
    return text.rfind(OPEN) > text.rfind(CLOSE)


def response_text(tokenizer: Tokenizer, tokens: Sequence[int], stop: Sequence[str]) -> str:
    """The response before the first of the stop texts, without special tokens."""
    return before_stop(tokenizer.decode(tokens), stop)


@dataclass(frozen=True)
class Chat:
    """A rendered chat and where the assistant's words are in it."""

    text: str
    answers: list[tuple[int, int]]  # [start, end) in characters


def render_chat(messages: Any) -> Chat:
    """A chat as the paper writes it: "User: " and "Assistant: " before the turns, one newline between (PRISM §3.1).

    [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}] -> "User: 1+1?\\nAssistant: 2", where
    the answer is the last "2". A system message stands as its bare text. Raises ValueError for another role or a
    message without content.
    """
    text, answers = "", []
    if not isinstance(messages, list):
        raise ValueError(f"'messages' is a {type(messages).__name__}, needs a list of {{role, content}}")
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or role not in _ROLES or not isinstance(content, str):
            raise ValueError(f"message {message!r:.200} needs a role of {sorted(_ROLES)} and a content of text")
        text += ("\n" if text else "") + _ROLES[role] + content
        if role == "assistant":
            answers.append((len(text) - len(content), len(text)))
    return Chat(text, answers)


def check_text(text: str) -> str:
    """The text itself. Raises ValueError where it holds half a character (a lone surrogate), which no UTF-8 can hold.

    JSON can: "\\ud83d" without its second half is legal to its readers, and to no tokenizer or writer after them.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"half a character, the lone surrogate \\u{ord(text[error.start]):04x}, at character {error.start + 1} of"
            f" {text[max(0, error.start - 20) : error.end + 20]!r}; mend or remove it"
        ) from None
    return text


def _eos_of(file: Path) -> tuple[int, ...]:
    named = _object(file).get("eos_token_id") if file.is_file() else None
    ids = [] if named is None else named if isinstance(named, list) else [named]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError(f"{file}: eos_token_id is {named!r:.80}; needed: a token id, a number, or a list of them")
    return tuple(ids)


def _named_tokens(folder: Path) -> dict[str, str]:
    """{"eos_token": "</s>", ...}: texts of the special tokens that the files beside a tokenizer.json name."""
    named: dict[str, str] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        for name, token in (_object(file) if file.is_file() else {}).items():
            if name.endswith("_token") and not name.startswith("add_") and token is not None:
                text = token.get("content") if isinstance(token, dict) else token
                if not isinstance(text, str):
                    if isinstance(token, bool):  # a setting of some class, not a token
                        continue
                    raise ValueError(f"{file}: {name} is {token!r:.80}; needed: the token's text")
                named[name] = text
    return named


def _chat_template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no text: {error}") from error
    config = folder / "tokenizer_config.json"
    template = _object(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):  # several by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{config}: chat_template is a {type(template).__name__}; needed: a text")
    return template


def _object(file: Path) -> dict[str, Any]:
    """The JSON object of a file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}; get it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a JSON {type(found).__name__}; needed: an object")
    return found
