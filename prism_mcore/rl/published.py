"""Prompt sets with verifiable answers as they are published, and the record that each row becomes.

Columns are those of the data sets' pages on Hugging Face. A row that is no prompt raises NotUsable with the reason; one
that has not the columns of its layout is an error.
"""

import ast
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from prism_mcore.rewards.format import boxed, final_answer

Row = Mapping[str, Any]
Record = dict[str, Any]

FUNCTION = "Write a Python function `{name}`, and put the whole program into a fenced block."
PROGRAM = "Write a Python program that reads standard input and writes standard output, in a fenced block."


class NotUsable(ValueError):
    """A row that is left out; the message is the reason, the same for rows alike."""


@dataclass(frozen=True)
class Layout:
    """A published set: columns that tell it from others, and what a row becomes."""

    columns: tuple[str, ...]
    make: Callable[[Row], Record]


def layout_of(columns: Iterable[str]) -> str:
    """The name of the layout that has these columns. Raises ValueError where none, or several do."""
    have = set(columns)
    found = [name for name, layout in LAYOUTS.items() if have.issuperset(layout.columns)]
    if len(found) != 1:
        known = "; ".join(f"{name}: {', '.join(layout.columns)}" for name, layout in LAYOUTS.items())
        which = "that of several" if found else "that of none"
        raise ValueError(f"the columns {', '.join(sorted(have))} are {which}; name the layout. Known: {known}")
    return found[0]


def _json(value: Any, what: str) -> Any:
    """A column that holds JSON as text, or already what the text would say."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise NotUsable(f"{what} is no JSON") from error


def _text(row: Row, column: str) -> str:
    if not isinstance(row[column], str) or not row[column].strip():
        raise NotUsable(f"{column} is empty")
    return row[column]


def _math(prompt: str, answers: Any) -> Record:
    """A question with one answer; several mean the same question in several ways, of which the first is taken."""
    answer = answers[0] if isinstance(answers, list) and answers else answers
    number = isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer)
    if not number and not (isinstance(answer, str) and answer.strip()):
        raise NotUsable("no answer")
    return {"prompt": prompt, "answer": str(answer).strip(), "reward": "math"}


# --- programs ---------------------------------------------------------------------------------------------------------


def program_tests(found: Any, name: str | None = None) -> dict[str, Any]:
    """The tests of a program in any of the published shapes, as the code reward reads them.

    {"inputs": [...], "outputs": [...], "fn_name"}: TACO, APPS and Skywork-OR1. A list of {"input", "output"} with
    `type` stdin_stdout or function_call and `fn_name` (INTELLECT-2, DeepCoder's primeintellect), with `testtype` stdin
    or functional and metadata.func_name (LiveCodeBench), or without (Codeforces). A list of assert lines
    (OpenCodeInstruct), where they compare calls of one function with what a literal says.
    """
    found = _json(found, "tests")
    if isinstance(found, Mapping) and "inputs" in found:
        inputs, outputs = found["inputs"], found.get("outputs")
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise NotUsable("not an output for each input")
        return _tests(list(zip(inputs, outputs, strict=True)), found.get("fn_name") or name)
    if isinstance(found, list) and found and all(isinstance(case, str) for case in found):
        return _assertions(found)
    if not isinstance(found, list) or not found or not all(isinstance(case, Mapping) for case in found):
        raise NotUsable("no tests")
    kinds = {case.get("type") or case.get("testtype") or "stdin" for case in found}
    if len(kinds) > 1:
        raise NotUsable("tests of several kinds")
    names = {case.get("fn_name") or _json(case.get("metadata") or {}, "metadata").get("func_name") for case in found}
    called = next(iter(names)) or name if kinds & {"function_call", "functional"} and len(names) == 1 else None
    if kinds & {"function_call", "functional"} and not called:
        raise NotUsable("a function without a name")
    if not all("input" in case and "output" in case for case in found):
        raise NotUsable("a test without input or output")
    if kinds == {"functional"}:  # LiveCodeBench: one argument a line, each a literal, as is what is returned
        calls = [{"args": _lines(case["input"]), "expected": _literal(case["output"])} for case in found]
        return _function(called, calls)
    return _tests([(case["input"], case["output"]) for case in found], called)


def _tests(pairs: list[tuple[Any, Any]], name: str | None) -> dict[str, Any]:
    """Of a function where there is a name. APPS, TACO and their kin put each value that is returned into a list."""
    if not pairs:
        raise NotUsable("no tests")
    if name is None:
        cases = [{"input": _joined(given), "output": _joined(wanted)} for given, wanted in pairs]
        return {"type": "stdin", "cases": cases}
    wrapped = all(isinstance(wanted, list) and len(wanted) == 1 for _, wanted in pairs)
    calls = [{"args": _arguments(given), "expected": wanted[0] if wrapped else wanted} for given, wanted in pairs]
    return _function(name, calls)


def _function(name: Any, cases: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "function", "name": str(name).split(".")[-1], "cases": cases}


def _joined(value: Any) -> str:
    """Standard input or output, of which some sets keep a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _lines(text: Any) -> Any:
    return [_literal(line) for line in text.split("\n") if line.strip()] if isinstance(text, str) else text


def _literal(text: Any) -> Any:
    """What a text says as JSON or as a Python literal; the text itself otherwise."""
    if not isinstance(text, str):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _arguments(given: Any) -> list[Any]:
    given = _literal(given)
    if not isinstance(given, list):
        raise NotUsable("arguments that are no list")
    return given


def _assertions(lines: list[str]) -> dict[str, Any]:
    """`assert f(1, 2) == 3` lines as calls of f; those that are no such comparison make the row useless."""
    names, cases = set(), []
    for line in lines:
        try:
            (statement,) = ast.parse(line.strip()).body
            assert isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare)
            call, (wanted,) = statement.test.left, statement.test.comparators
            assert isinstance(statement.test.ops[0], ast.Eq | ast.Is) and isinstance(call, ast.Call)
            assert isinstance(call.func, ast.Name) and not call.keywords
            arguments = [ast.literal_eval(argument) for argument in call.args]
            expected = ast.literal_eval(wanted)
            json.dumps([arguments, expected], allow_nan=False)
        except (AssertionError, ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
            raise NotUsable("an assertion that compares no call with a literal") from error
        names.add(call.func.id)
        cases.append({"args": arguments, "expected": expected})
    if len(names) != 1:
        raise NotUsable("assertions of several functions")
    return json.loads(json.dumps({"type": "function", "name": names.pop(), "cases": cases}))


def _code(prompt: str, found: Any, name: str | None = None, starter: str = "") -> Record:
    tests = program_tests(found, name)
    how = FUNCTION.format(name=tests["name"]) if tests["type"] == "function" else PROGRAM
    given = f"\n\n```python\n{starter.strip()}\n```" if starter and starter.strip() else ""
    return {"prompt": f"{prompt.strip()}{given}\n\n{how}", "reward": "code", "tests": tests}


# --- the sets ---------------------------------------------------------------------------------------------------------


def _deepscaler(row: Row) -> Record:
    return _math(_text(row, "problem"), row["answer"])


def _skywork(row: Row) -> Record:
    """Math and code alike: verl's columns, the truth as JSON."""
    turns = row["prompt"]
    asked = [turn["content"] for turn in turns if turn["role"] == "user"] if isinstance(turns, list) else []
    if len(asked) != 1:
        raise NotUsable("not one turn of the user")
    truth = row["reward_model"]["ground_truth"]
    if row["ability"] == "code":
        return _code(asked[0], truth)
    with suppress(ValueError):  # an answer that is no list
        truth = json.loads(truth) if isinstance(truth, str) else truth
    return _math(asked[0], truth)


def _intellect(row: Row) -> Record:
    truth = _json(row["verification_info"], "verification_info")
    if "math" in row["task_type"]:
        return _math(_text(row, "prompt"), truth.get("ground_truth"))
    if "code" in row["task_type"]:
        if truth.get("language", "python") != "python":
            raise NotUsable("another language than Python")
        return _code(_text(row, "prompt"), truth.get("test_cases"))
    raise NotUsable("neither math nor code")


def _deepcoder(row: Row) -> Record:
    metadata = _json(row.get("metadata") or {}, "metadata")
    name = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    return _code(_text(row, "problem"), row["tests"], name, row.get("starter_code") or "")


def _opencodeinstruct(row: Row) -> Record:
    if float(row["average_test_score"]) < 1:
        raise NotUsable("its own program fails a test")
    return _code(_text(row, "input"), row["unit_tests"])


_LETTER = re.compile(r"\(?([A-J])\)?[.:]?")


def _nemotron_stem(row: Row) -> Record:
    """Multiple choice with a letter as answer, or a short answer: in the metadata, else the box of the answer given."""
    if row["category"] != "stem":
        raise NotUsable("another category than stem")
    turns = [turn for turn in row["messages"] if turn["role"] != "system"]
    if [turn["role"] for turn in turns] != ["user", "assistant"]:
        raise NotUsable("not one question and its answer")
    metadata = _json(row.get("metadata") or {}, "metadata")
    answer = metadata.get("expected_answer") if isinstance(metadata, Mapping) else None
    question, answer = _text(turns[0], "content"), answer or boxed(final_answer(_text(turns[1], "content")))
    letter = _LETTER.fullmatch(str(answer).strip())
    # A letter may also be a quantity or a unit: it is a choice where the question lists it.
    if letter and re.search(rf"^\W*{letter[1]}\s*[).:]", question, re.MULTILINE):
        return {"prompt": question, "answer": letter[1], "reward": "choice"}
    return _math(question, answer)


def _livecodebench(row: Row) -> Record:
    tests = _json(row["public_test_cases"], "public_test_cases")
    private = row.get("private_test_cases") or "[]"
    try:
        tests = tests + json.loads(private)
    except (ValueError, RecursionError) as error:  # their archive is a pickle, which is not read
        raise NotUsable("private tests that are no JSON: import the data set's decoded release") from error
    name = _json(row.get("metadata") or "{}", "metadata").get("func_name")
    return _code(_text(row, "question_content"), tests, name, row.get("starter_code") or "")


def _codeforces(row: Row) -> Record:
    parts = [row["description"], row.get("input_format"), row.get("output_format")]
    prompt = "\n\n".join(part.strip() for part in parts if part)
    return _code(prompt, row["official_tests"])


LAYOUTS: dict[str, Layout] = {
    "deepscaler": Layout(("problem", "answer", "solution"), _deepscaler),
    "skywork-or1": Layout(("data_source", "prompt", "ability", "reward_model"), _skywork),
    "intellect-2": Layout(("task_type", "prompt", "verification_info"), _intellect),
    "deepcoder": Layout(("problem", "tests", "solutions"), _deepcoder),
    "opencodeinstruct": Layout(("input", "output", "unit_tests", "average_test_score"), _opencodeinstruct),
    "nemotron-stem": Layout(("uuid", "category", "messages", "metadata"), _nemotron_stem),
    "livecodebench": Layout(("question_content", "public_test_cases", "starter_code"), _livecodebench),
    "codeforces": Layout(("description", "official_tests"), _codeforces),
}
