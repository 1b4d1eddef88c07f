"""Prompts with verifiable answers: JSONL files, rendered to tokens, mixed by weight, the same order in every layout."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from prism_mcore.batch import Prompt
from prism_mcore.data.history import History
from prism_mcore.data.order import key_of, permute
from prism_mcore.json_lines import JsonLines, Line, shown
from prism_mcore.model.settings import config_beside
from prism_mcore.rewards import check_record
from prism_mcore.text import Tokenizer, end_tokens, load_tokenizer, render_chat

if TYPE_CHECKING:
    from prism_mcore.model.spec import ModelSpec
    from prism_mcore.rl.settings import RLSettings

_ENCODE_AT_ONCE = 1 << 12  # texts


class PromptSource(Protocol):
    """One of `rl.prompts`."""

    path: str  # JSONL
    weight: float
    name: str  # for metrics; "": the file's


class PromptError(ValueError):
    """A prompt file that cannot be used; the message names file and line, what was got and what is needed."""


@dataclass(frozen=True)
class PromptFile:
    """One file: where its lines are and their tokens; 300,000 prompts of 200 tokens take 240 MB."""

    name: str
    path: Path
    lines: np.ndarray  # [n] int64: byte offset of each prompt's line
    tokens: np.ndarray  # int32, of all prompts in order
    ends: np.ndarray  # [n + 1] int64: prompt i is tokens[ends[i]:ends[i + 1]]
    rewards: frozenset[str]  # names that occur
    identity: str  # SHA-256 of the file
    blank: int = 0  # lines without anything, which were skipped

    def __len__(self) -> int:
        return len(self.lines)

    def record(self, number: int) -> dict[str, Any]:
        """The JSON object of prompt `number`."""
        with self.path.open("rb") as file:
            file.seek(self.lines[number])
            return json.loads(file.readline())

    def prompt(self, number: int, index: int) -> Prompt:
        record = self.record(number)
        tokens = tuple(self.tokens[self.ends[number] : self.ends[number + 1]].tolist())
        return Prompt(index, self.name, tokens, render(record), record)


class PromptSet:
    """Files mixed by weight. Which prompt is k-th is a pure function of (seed, k): each file is shuffled anew for each
    pass over it, and every prefix of the run is within one prompt of each file's share.
    """

    def __init__(self, files: Sequence[PromptFile], weights: Sequence[float], seed: int):
        self.files, self.seed = list(files), seed
        self.history = History.new([str(file.path) for file in files], [file.identity for file in files], weights)
        self.mixture = self.history.mixture
        self._starts = np.cumsum([0, *map(len, self.files)])

    def follow(self, history: History) -> None:
        """Ask on from where a history says that each file is."""
        self.history, self.mixture = history, history.mixture

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def blank(self) -> int:
        """Lines of the files that hold nothing."""
        return sum(file.blank for file in self.files)

    @property
    def rewards(self) -> frozenset[str]:
        """Names of the rewards that the prompts ask for."""
        return frozenset().union(*(file.rewards for file in self.files))

    def batch(self, step: int, size: int) -> list[Prompt]:
        """The `size` prompts of a step, steps counted from 1."""
        return self.following((step - 1) * size, size)

    def following(self, asked: int, count: int) -> list[Prompt]:
        """The `count` prompts after the first `asked`."""
        samples = np.arange(asked, asked + count)
        sources, ordinals = self.mixture.locate(samples)
        return [self._shuffled(int(s), int(o)) for s, o in zip(sources, ordinals, strict=True)]

    def first(self, count: int) -> list[Prompt]:
        """The first `count` prompts in the files' own order, file by file in turn; fewer where there are no more."""
        places = sorted((n, f) for f, file in enumerate(self.files) for n in range(min(len(file), count)))
        return [self._prompt(f, n) for n, f in places[:count]]

    def numbered(self, index: int) -> Prompt:
        """The prompt with this place in the mixture, `Prompt.index`."""
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._prompt(source, index - int(self._starts[source]))

    def _shuffled(self, source: int, ordinal: int) -> Prompt:
        size = len(self.files[source])
        epoch, place = divmod(ordinal, size)
        number = (
            permute(np.array([place]), size, key_of(self.seed, self.history.sources[source].key, epoch))
            if size > 1
            else [0]
        )
        return self._prompt(source, int(number[0]))

    def _prompt(self, source: int, number: int) -> Prompt:
        return self.files[source].prompt(number, int(self._starts[source]) + number)


@dataclass(frozen=True)
class Prompts:
    """What a run asks, and the tokenizer that asks it."""

    training: PromptSet
    held_out: PromptSet | None
    tokenizer: Tokenizer
    eos: tuple[int, ...]  # tokens that end a response: those of the tokenizer's folder and of the model's

    @property
    def beside(self) -> dict[str, Any]:
        """What a run should not change in the middle, beside the training prompts themselves: by the setting's name."""
        held_out = [file.identity for file in self.held_out.files] if self.held_out else []
        return {"rl.tokenizer": self.tokenizer.sha256, "rl.held_out": held_out}


def open_prompts(settings: "RLSettings", spec: "ModelSpec") -> Prompts:
    """Every prompt of validated settings, read and checked; PromptError names the line of the file that is wrong."""
    rl, folder = settings.rl, settings.rl.tokenizer or settings.model.init
    if not (Path(folder) / "tokenizer.json").is_file():
        raise PromptError(
            f"{folder} has no tokenizer.json; give rl.tokenizer the folder of the model's tokenizer, or model.init a"
            " Hugging Face directory that has one"
        )
    try:
        tokenizer = load_tokenizer(folder)
        # A run or a checkpoint keeps the files of the model it started from.
        kept = config_beside(settings.model.init)
        eos = end_tokens([folder, settings.model.init, *([kept] if kept else [])], tokenizer)
    except ValueError as error:
        raise PromptError(str(error)) from error

    def load(sources: Sequence[PromptSource]) -> PromptSet:
        longest = rl.context - settings.sampling.max_tokens
        return load_prompts(sources, tokenizer, vocab_size=spec.vocab_size, longest=longest, seed=settings.run.seed)

    return Prompts(load(rl.prompts), load(rl.held_out) if rl.held_out else None, tokenizer, eos)


def load_prompts(
    sources: Sequence[PromptSource], tokenizer: Tokenizer, *, vocab_size: int, longest: int, seed: int
) -> PromptSet:
    """Read, check and tokenize every prompt of `sources`, before anything expensive starts.

    tokenizer: adds BOS where its tokenizer.json does. longest: tokens a prompt may have.
    Raises PromptError for a file that is missing or empty, a line that is no JSON object or lacks `prompt`/`messages`,
    `reward` or what that reward needs, an unknown reward, one whose package is not installed, an empty prompt, a prompt
    that is too long, and a tokenizer that does not fit the model.
    """
    if not sources:
        raise PromptError("rl.prompts is empty; give at least one {path, weight, name}")
    try:
        tokenizer.check_fits(vocab_size, "give rl.tokenizer the model's own")
    except ValueError as error:
        raise PromptError(str(error)) from error
    files = [_read(source, tokenizer, longest) for source in sources]
    return PromptSet(files, [source.weight for source in sources], seed)


def render(record: Mapping[str, Any]) -> str:
    """A prompt as the paper shows it to a base model: "User: ...", a line break, "Assistant:" (PRISM §3.1).

    No space at the end: tokenizers join it to the word that comes.
    """
    return render_chat([*_turns(record), {"role": "assistant", "content": ""}]).text.rstrip(" ")


def _read(source: PromptSource, tokenizer: Tokenizer, longest: int) -> PromptFile:
    path = Path(source.path)
    lines, tokens, rewards = [], [], set()
    numbered: list[tuple[int, str]] = []

    def encode() -> None:
        texts = [text for _, text in numbered]
        for (number, _), ids in zip(numbered, tokenizer.encode_batch(texts), strict=True):
            if len(ids) > longest:
                raise PromptError(
                    f"{path}, line {number}: the prompt has {len(ids):,} tokens; at most {longest:,} fit"
                    " beside a response of sampling.max_tokens; shorten it, or raise rl.context"
                )
            tokens.append(np.array(ids, dtype=np.int32))
        numbered.clear()

    file = JsonLines(path)
    for number, offset, record in _records(file):
        try:
            rewards.add(check_record(record))
            numbered.append((number, _checked(record)))
        except ValueError as error:
            raise PromptError(f"{path}, line {number}: {error}") from error
        lines.append(offset)
        if len(numbered) == _ENCODE_AT_ONCE:
            encode()
    encode()
    if not lines:
        raise PromptError(f"{path} has no prompts; needed: one JSON object per line")
    ends = np.cumsum([0, *map(len, tokens)])
    return PromptFile(
        source.name or path.stem,
        path,
        np.array(lines),
        np.concatenate(tokens),
        ends,
        frozenset(rewards),
        hashlib.sha256(path.read_bytes()).hexdigest(),
        file.blank,
    )


def _records(file: JsonLines) -> Iterator[Line]:
    try:
        yield from file
    except OSError as error:
        raise PromptError(f"rl.prompts: cannot read {file.path}: {error.strerror}") from error
    except ValueError as error:
        raise PromptError(str(error)) from error


def _checked(record: dict[str, Any]) -> str:
    """The rendered prompt of a record. Raises ValueError where it is none."""
    if not record.get("messages") and not isinstance(record.get("prompt"), str):
        raise ValueError(f"no text under 'prompt' and no 'messages'; the record has {', '.join(sorted(record))}")
    text, turns = render(record), _turns(record)
    if not turns[-1]["content"].strip():
        raise ValueError("the prompt is empty")
    if turns[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's, the answer perhaps; needed: the question last")
    return text


def _turns(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages of a record; a file of both kinds of records has null, or no message, under the other's key."""
    messages = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
    if not isinstance(messages, list):
        raise ValueError(f"messages is {shown(messages)}; needed: a list of {{role, content}}")
    return messages
