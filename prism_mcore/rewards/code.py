"""Programs, rewarded by the tests that they pass; run in the sandbox, compared with what is expected outside it."""

import functools
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from prism_mcore.json_lines import shown
from prism_mcore.rewards.format import final_answer
from prism_mcore.rewards.sandbox import Outcome, Sandbox, SandboxError

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+#.-]*)[^\n]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)
_TOLERANCE = 1e-6  # of a number with a fraction, absolute below 1 and relative above
_KEYS: dict[str, dict[str, type]] = {
    "stdin": {"input": str, "output": str},
    "function": {"args": list, "expected": object},
    "asserts": {"before": str, "after": str},
}


@dataclass(frozen=True)
class Limits:
    """What a program may take, and how its tests count."""

    test_s: float = 4.0
    program_s: float = 30.0
    memory_mb: int = 512
    score: str = "share"


limits = Limits()  # of this process; `configure` changes them
_sandbox: Sandbox | None = None


def configure(wanted: Limits) -> None:
    """Set this process's limits and open its sandbox. Raises SandboxError where none holds here."""
    global limits
    limits = wanted
    _open()


def code(record: Mapping[str, Any], response: str) -> dict[str, float]:
    """correct = 1 where the response's program passes every test of record["tests"], else 0.

    The program is the last fenced block after the reasoning. By limits.score "share" one that fails some tests has a
    second part, the share it passes: {"correct": 0.0, "tests": 0.5}. Raises SandboxError where the sandbox fails.
    """
    program = last_block(final_answer(response))
    passed = [] if program is None else _passed(program, record["tests"])
    share = sum(passed) / len(record["tests"]["cases"])
    if share == 1.0 or limits.score == "all":
        return {"correct": float(share == 1.0)}
    return {"correct": 0.0, "tests": share}


def check(record: Mapping[str, Any]) -> None:
    """Raises ValueError where record["tests"] are no tests, or no sandbox holds on this machine."""
    tests = record["tests"]
    if not isinstance(tests, Mapping) or tests.get("type") not in _KEYS:
        raise ValueError(f"tests is {shown(tests)}; needed: an object whose type is one of {', '.join(_KEYS)}")
    kind, cases = tests["type"], tests.get("cases")
    known = {"type", "cases"} | ({"name"} if kind == "function" else set())
    if unknown := sorted(set(tests) - known):
        raise ValueError(f"tests has {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    if not isinstance(cases, list) or not cases:
        raise ValueError(f"tests.cases is {shown(cases)}; needed: a list of at least one")
    if kind == "function" and not (isinstance(name := tests.get("name"), str) and name.isidentifier()):
        raise ValueError(f"tests.name is {shown(tests.get('name'))}; needed: the name of a function")
    for number, case in enumerate(cases):
        _check_case(f"tests.cases[{number}]", case, _KEYS[kind])
    _check_machine()


def _check_case(where: str, case: object, keys: Mapping[str, type]) -> None:
    if not isinstance(case, Mapping) or set(case) != set(keys):
        raise ValueError(f"{where} is {shown(case)}; needed: an object of {' and '.join(keys)}")
    for key, kind in keys.items():
        if not isinstance(case[key], kind):
            needed = "a list" if kind is list else "a text"
            raise ValueError(f"{where}.{key} is {shown(case[key])}; needed: {needed}")


@functools.cache
def _check_machine() -> None:
    try:
        Sandbox().close()
    except SandboxError as error:
        raise ValueError(str(error)) from error


def last_block(answer: str) -> str | None:
    """The text of the last fenced block, or None."""
    found = _FENCE.findall(answer)
    return found[-1][1] if found else None


def _passed(program: str, tests: Mapping[str, Any]) -> list[bool]:
    """Which tests the program passes; those that it has no time for are not passed."""
    global _sandbox
    sandbox = _open()
    try:
        return _run(sandbox, program, tests)
    except SandboxError:
        sandbox.close()
        _sandbox = None  # the next response gets a new one
        raise


def _open() -> Sandbox:
    global _sandbox
    if _sandbox is None or _sandbox.memory_mb != limits.memory_mb:
        if _sandbox is not None:
            _sandbox.close()
        _sandbox = Sandbox(limits.memory_mb)
    return _sandbox


def _run(sandbox: Sandbox, program: str, tests: Mapping[str, Any]) -> list[bool]:
    cases = tests["cases"]
    if tests["type"] == "function":
        calls = [case["args"] for case in cases]
        returned = sandbox.call(program, tests["name"], calls, limits.test_s, limits.program_s)
        return [r.status == "ok" and same_value(r.value, c["expected"]) for r, c in zip(returned, cases, strict=True)]
    passed: list[bool] = []
    left = limits.program_s
    for case in cases:
        if left <= 0 or (limits.score == "all" and not all(passed)):
            break
        seconds = min(limits.test_s, left)
        if tests["type"] == "asserts":
            outcome, right = _run_asserts(sandbox, program, case, seconds)
        else:
            outcome = sandbox.run(program, case["input"].encode(), seconds)
            right = same_output(outcome.stdout, case["output"])
        left -= outcome.seconds
        passed.append(outcome.status == "ok" and right)
    return passed


def _run_asserts(sandbox: Sandbox, program: str, case: Mapping[str, str], seconds: float) -> tuple[Outcome, bool]:
    """Run the program between what belongs around it; passed where the end is reached, which a nonce on stdin tells.

    The tests are in the program's own process: one that is written against this can pass. Not for training.
    """
    nonce = secrets.token_hex(8)
    text = f"{case['before']}\n{program}\n{case['after']}\nimport sys; print('\\n' + sys.stdin.readline())\n"
    outcome = sandbox.run(text, f"{nonce}\n".encode(), seconds)
    return outcome, outcome.stdout.rstrip().endswith(nonce.encode())


def same_value(found: object, expected: object) -> bool:
    """Are two values of JSON equal? Numbers with a fraction to 1e-6; true and false are no numbers."""
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, int | float) and isinstance(expected, int | float):
        if isinstance(found, int) and isinstance(expected, int):
            return found == expected
        return _close(found, expected)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(same_value, found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same_value(found[key], expected[key]) for key in expected)
    return type(found) is type(expected) and found == expected


def same_output(found: bytes, expected: str) -> bool:
    """Are two outputs equal, line by line and word by word? White space around words and at the end does not count."""
    lines, wanted = _lines(found.decode(errors="replace")), _lines(expected)
    return len(lines) == len(wanted) and all(map(_same_words, lines, wanted))


def _lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.rstrip().split("\n")]


def _same_words(found: Sequence[str], expected: Sequence[str]) -> bool:
    return len(found) == len(expected) and all(
        f == e or _same_fraction(f, e) for f, e in zip(found, expected, strict=True)
    )


def _same_fraction(found: str, expected: str) -> bool:
    if not re.fullmatch(r"[+-]?\d*\.\d*(?:[eE][+-]?\d+)?|[+-]?\d+[eE][+-]?\d+", expected):
        return False
    try:
        return _close(float(Decimal(found)), float(Decimal(expected)))
    except (InvalidOperation, OverflowError, ValueError):
        return False


def _close(found: float, expected: float) -> bool:
    try:
        return abs(found - expected) <= _TOLERANCE * max(1.0, abs(expected))
    except OverflowError:  # an int that no float holds
        return False
