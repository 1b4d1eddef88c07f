"""The code reward: which program counts, what passes a test, whose fault a failure is."""

import pytest

from prism_mcore.rewards import check_record, code
from prism_mcore.rewards.sandbox import Sandbox, SandboxError
from prism_mcore.rewards.settings import RewardSettings
from prism_mcore.rewards.verifier import Verifier


@pytest.fixture(scope="module", autouse=True)
def _sandbox():
    try:
        Sandbox().close()
    except SandboxError as error:
        pytest.skip(str(error))


STDIN = {"type": "stdin", "cases": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5", "output": "10"}]}
ADD = {
    "type": "function",
    "name": "add",
    "cases": [{"args": [1, 2], "expected": 3}, {"args": ["a", "b"], "expected": "ab"}],
}
READS = "print(sum(map(int, input().split())))"


def fenced(program: str, language: str = "python") -> str:
    return f"<think>thoughts</think> Here it is:\n```{language}\n{program}\n```\nDone."


def rewarded(tests: dict, response: str) -> dict[str, float]:
    return code.code({"reward": "code", "tests": tests}, response)


@pytest.mark.parametrize(
    ("tests", "response", "parts"),
    [
        (STDIN, fenced(READS), {"correct": 1.0}),
        (STDIN, fenced(READS, ""), {"correct": 1.0}),
        (STDIN, READS, {"correct": 0.0, "tests": 0.0}),
        (STDIN, fenced(READS).replace("</think>", ""), {"correct": 0.0, "tests": 0.0}),
        (STDIN, fenced("print(3)"), {"correct": 0.0, "tests": 0.5}),
        (STDIN, fenced("print(3)") + fenced(READS), {"correct": 1.0}),
        (STDIN, fenced(READS) + fenced("print(3)"), {"correct": 0.0, "tests": 0.5}),
        (STDIN, fenced("print(1/0)"), {"correct": 0.0, "tests": 0.0}),
        (STDIN, fenced("def (:"), {"correct": 0.0, "tests": 0.0}),
        (STDIN, fenced(READS + "\nraise SystemExit(1)"), {"correct": 0.0, "tests": 0.0}),
        (ADD, fenced("def add(a, b): return a + b"), {"correct": 1.0}),
        (ADD, fenced("class Solution:\n    def add(self, a, b): return a + b"), {"correct": 1.0}),
        (ADD, fenced("def add(a, b): return 3"), {"correct": 0.0, "tests": 0.5}),
        (ADD, fenced("def plus(a, b): return a + b"), {"correct": 0.0, "tests": 0.0}),
        (ADD, fenced("import os\nos._exit(0)"), {"correct": 0.0, "tests": 0.0}),
        (ADD, fenced("import sys\nsys.exit(0)"), {"correct": 0.0, "tests": 0.0}),
        (
            ADD,
            fenced("class A(int):\n    __eq__ = lambda *_: True\ndef add(a, b): return A()"),
            {"correct": 0, "tests": 0},
        ),
    ],
)
def test_the_last_blocks_program_is_rewarded(tests, response, parts):
    assert rewarded(tests, response) == parts


def test_all_or_nothing_and_the_time_of_a_test(monkeypatch):
    monkeypatch.setattr(code, "limits", code.Limits(test_s=2.0, score="all"))
    assert rewarded(STDIN, fenced("print(3)")) == {"correct": 0.0}
    assert rewarded(STDIN, fenced(READS)) == {"correct": 1.0}
    monkeypatch.setattr(code, "limits", code.Limits(test_s=0.5, program_s=60.0))
    slow = "def add(a, b):\n    if a == 1:\n        while True: pass\n    return a + b"
    assert rewarded(ADD, fenced(slow)) == {"correct": 0.0, "tests": 0.5}


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("3\n", "3", True),
        ("3  \n\n", "3\n", True),
        ("1 2", "1  2", True),
        ("1\n2", "1 2", False),
        ("0.5000001", "0.5", True),
        ("0.51", "0.5", False),
        ("1e-9", "0.0", True),
        ("nan", "0.5", False),
        ("1000001", "1000000", False),
        ("1000000.0", "1000000", False),
        ("YES", "yes", False),
        ("", "3", False),
        ("", "", True),
    ],
)
def test_outputs_are_compared_by_words(found, expected, same):
    assert code.same_output(found.encode(), expected) is same


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        (3, 3, True),
        (3.0, 3, True),
        (10**30, 10**30 + 1, False),
        (0.1 + 0.2, 0.3, True),
        (True, 1, False),
        (1, True, False),
        ([1, [2.0]], [1, [2]], True),
        ([1], [1, 1], False),
        ({"a": 1}, {"a": 1}, True),
        ({}, {"a": 1}, False),
        ("1", 1, False),
        (None, None, True),
        (None, 0, False),
        (float("nan"), 1.0, False),
        (10**400, 1.5, False),
    ],
)
def test_values_are_compared_as_json(found, expected, same):
    assert code.same_value(found, expected) is same


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (None, "needs 'tests'"),
        ([1], "tests is .1.; needed: an object whose type is one of stdin, function"),
        ({"type": "shell", "cases": []}, "needed: an object whose type is one of"),
        ({**STDIN, "cases": []}, "tests.cases is .*needed: a list of at least one"),
        ({**STDIN, "cases": [{"input": "1"}]}, r"tests.cases\[0\] is .*needed: an object of input and output"),
        ({**STDIN, "cases": [{"input": "1", "output": 1}]}, r"tests.cases\[0\].output is 1; needed: a text"),
        ({**STDIN, "name": "f"}, "tests has name; known are cases, type"),
        ({**ADD, "name": "a b"}, "tests.name is .*needed: the name of a function"),
        ({**ADD, "cases": [{"args": 1, "expected": 1}]}, r"tests.cases\[0\].args is 1; needed: a list"),
    ],
)
def test_bad_tests_are_refused_where_prompts_are_read(tests, message):
    record = {"prompt": "Add.", "reward": "code", "tests": tests}
    with pytest.raises(ValueError, match=message):
        check_record(record)


def test_a_machine_without_a_sandbox_is_said_where_prompts_are_read(monkeypatch):
    def none(*_):
        raise SandboxError("no sandbox holds on this machine; install bubblewrap")

    code._check_machine.cache_clear()
    monkeypatch.setattr(code, "Sandbox", none)
    with pytest.raises(ValueError, match=r"reward code cannot use the record: no sandbox holds .*install bubblewrap"):
        check_record({"prompt": "Add.", "reward": "code", "tests": STDIN})
    code._check_machine.cache_clear()


def test_good_tests_are_taken():
    assert check_record({"prompt": "Add.", "reward": "code", "tests": STDIN}) == "code"
    assert check_record({"prompt": "Add.", "reward": "code", "tests": ADD}) == "code"


def test_the_pool_rewards_programs_beside_other_rewards():
    """More programs than workers, one that hangs beyond timeout_s and one that kills what it can: others are served."""
    limits = RewardSettings(code_test_s=3.0, code_score="all").code_limits()
    record = {"reward": "code", "tests": STDIN}
    programs = [READS, "while True: pass", "import os, signal\nos.kill(os.getppid(), 9)", "print(3)", READS]
    with Verifier(workers=2, timeout_s=2.0, rewards=["code", "math"], programs=limits) as verifier:
        for ticket, program in enumerate(programs):
            verifier.submit(ticket, record, fenced(program))
        for ticket in range(10, 14):
            verifier.submit(ticket, {"reward": "math", "answer": "1/2"}, r"\boxed{0.5}")
        verdicts = {v.ticket: (v.status, v.parts.get("correct")) for v in verifier.results(block=True)}
    assert [verdicts[n] for n in range(5)] == [("ok", float(right)) for right in (1, 0, 0, 0, 1)]
    assert [verdicts[n] for n in range(10, 14)] == [("ok", 1.0)] * 4


def test_a_sandbox_that_fails_masks_the_response(monkeypatch, tmp_path):
    """The harness's fault, not the program's: a worker whose starter is killed ends, and its pool replaces it."""
    import psutil

    record = {"reward": "code", "tests": STDIN}
    with Verifier(workers=1, timeout_s=5.0, rewards=["code"]) as verifier:
        verifier.submit(0, record, fenced(READS))
        assert [v.status for v in verifier.results(block=True)] == ["ok"]
        (worker,) = verifier._workers
        for starter in psutil.Process(worker.process.pid).children():
            starter.kill()
        verifier.submit(1, record, fenced(READS))
        assert [(v.status, dict(v.parts)) for v in verifier.results(block=True)] == [("crash", {})]
        verifier.submit(2, record, fenced(READS))
        assert [v.status for v in verifier.results(block=True)] == ["ok"]
