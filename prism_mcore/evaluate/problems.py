"""The questions of a task: JSONL read and checked, options in the order of a sample, the prompt as it is asked.

A line is {"id": "...", "question": "...", "answer": "204"} for math; {..., "choices": ["...", ...], "answer": 2}, the
right one's place from 0, for choices; {..., "tests": {...}} for programs, as docs/add-a-reward.md has them. A line of
an RL prompt file (`prompt` or `messages`, `reward` and what it needs) is a question, too, asked as it stands.
"""

import hashlib
import json
import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_mcore.evaluate.tasks import Task
from prism_mcore.json_lines import JsonLines, shown
from prism_mcore.rewards import check_record
from prism_mcore.text import Tokenizer, render_chat

EVALCHEMY_SEED = 42  # of the generator that Evalchemy's GPQADiamond makes anew for each question, right answer first
LETTERS = string.ascii_uppercase[:10]


@dataclass(frozen=True)
class Problem:
    """One question. `key` is a hash of all that is asked: another where a word of it changes."""

    id: str
    key: str
    record: Mapping[str, Any]
    line: int

    @property
    def text(self) -> str:
        """The question alone, without options and instructions."""
        record = self.record
        return str(record.get("question") or record.get("prompt") or record["messages"][-1]["content"])


@dataclass(frozen=True)
class Asked:
    """A question as one sample gets it: the turns of a chat, and the record that its reward is given."""

    messages: list[dict[str, str]]
    record: dict[str, Any]
    order: tuple[int, ...] = ()  # of the options: order[0] is the place in the file of what is now A


def read_problems(path: Path, task: Task, *, partial: bool = False) -> list[Problem]:
    """The questions of a task. partial: fewer than were published are all right.

    Raises ValueError that names file and line for a line that is no question of the task, one that is there twice, and
    a file that is not there, empty, or of another number of questions than the task has.
    """
    if not path.is_file():
        raise ValueError(
            f"{task.name}: there is no {path}; make it with `python tools/import_benchmark.py {task.name}`, or set"
            " evaluate.problems to the folder that has it"
        )
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for number, _, record in JsonLines(path):
        try:
            problem = _problem(record, task, number)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        for name in (problem.key, f"id {problem.id}"):
            if name in seen:
                raise ValueError(f"{path}, line {number}: the question or its id is that of line {seen[name]}")
            seen[name] = number
        problems.append(problem)
    if not problems:
        raise ValueError(f"{path} has no questions; needed: one JSON object per line")
    if task.rows and (len(problems) > task.rows or (len(problems) < task.rows and not partial)):
        allow = "; evaluate.partial=true takes it as it is, and says so" if len(problems) < task.rows else ""
        raise ValueError(f"{path} has {len(problems):,} questions; {task.title} has {task.rows:,}{allow}")
    return problems


def _problem(record: dict[str, Any], task: Task, line: int) -> Problem:
    asked_as_it_stands = "prompt" in record or "messages" in record
    reward = record.get("reward") or task.reward
    if not reward:
        raise ValueError(f"no `reward`, which a file of no known task needs; the line has {_names(record)}")
    if not asked_as_it_stands:
        needed = {"math": ["answer"], "choice": ["choices", "answer"], "code": ["tests"]}.get(reward, [])
        for name in ("id", "question", *needed):
            if name not in record:
                raise ValueError(f"no {name!r}; {task.name} needs it, the line has {_names(record)}")
        for name in ("id", "question"):
            if not isinstance(record[name], str) or not record[name].strip():
                raise ValueError(f"{name} is {shown(record[name])}; needed: a text")
        if reward == "choice":
            _check_choices(record["choices"], record["answer"])
    asked = [record.get(name) for name in ("id", "question", "choices", "prompt", "messages")]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    problem = Problem(str(record.get("id") or f"line {line}"), key, record | {"reward": reward}, line)
    check_record(ask(problem, task, 0).record)
    return problem


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(sorted(record)) or "nothing"


def _check_choices(choices: Any, answer: Any) -> None:
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS) or not all(map(_is_text, choices)):
        raise ValueError(f"choices is {shown(choices)}; needed: a list of 2 to {len(LETTERS)} texts")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"answer is {shown(answer)}; needed: the right choice's place, 0 to {len(choices) - 1}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def ask(problem: Problem, task: Task, sample: int, *, seed: int = 0, options: str = "shuffled") -> Asked:
    """The question as sample number `sample` gets it."""
    record = dict(problem.record)
    if "prompt" in record or "messages" in record:
        turns = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
        return Asked([dict(turn) for turn in turns], record)
    text, order = str(record["question"]), tuple[int, ...]()
    if record["reward"] == "choice":
        order = order_of(problem, sample, seed, options)
        text += "\n" + "".join(f"\n{LETTERS[n]}) {record['choices'][place]}" for n, place in enumerate(order))
        record["answer"] = LETTERS[order.index(record["answer"])]
    return Asked([{"role": "user", "content": text + task.instruction}], record, order)


def order_of(problem: Problem, sample: int, seed: int, options: str) -> tuple[int, ...]:
    """The options' places in the file, in the order in which a sample sees them.

    options: "shuffled" by (seed, question, sample); "given", as in the file; "evalchemy", as its GPQADiamond has them:
    the right one first, then shuffled by the same seed in every question, so that it ends as D of four.
    """
    count, right = len(problem.record["choices"]), problem.record["answer"]
    if options == "given":
        return tuple(range(count))
    if options == "evalchemy":
        places = [right, *(place for place in range(count) if place != right)]
        random.Random(EVALCHEMY_SEED).shuffle(places)
        return tuple(places)
    draws = [hashlib.sha256(f"{seed}/{problem.key}/{sample}/{place}".encode()).digest() for place in range(count)]
    return tuple(sorted(range(count), key=draws.__getitem__))


def prompt_text(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, style: str) -> tuple[str, bool]:
    """A chat as text, and whether it brings its own first token (BOS).

    style: "template", the tokenizer's chat template; "turns", as PRISM mid-trains (`User: ...`, line break,
    `Assistant:`); "plain", the last message alone; "auto", the template where there is one, else turns.
    """
    if style == "template" or (style == "auto" and tokenizer.chat_template is not None):
        return tokenizer.render(messages), True
    if style == "plain":
        return messages[-1]["content"], False
    return render_chat([*messages, {"role": "assistant", "content": ""}]).text.rstrip(" "), False


def stops_of(tokenizer: Tokenizer, style: str) -> list[str]:
    """Texts that end a response: in turns the next turn."""
    return ["\nUser:"] if style == "turns" or (style == "auto" and tokenizer.chat_template is None) else []
