"""tools/import_prompts.py on rows of our own in the published layouts: what they become, what is left out, and why."""

import importlib.util
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from prism_mcore.rl.published import LAYOUTS, NotUsable, program_tests

spec = importlib.util.spec_from_file_location(
    "import_prompts", Path(__file__).parents[2] / "tools" / "import_prompts.py"
)
import_prompts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(import_prompts)

ADD = {"type": "function", "name": "add", "cases": [{"args": [1, 2], "expected": 3}]}
ECHO = {"type": "stdin", "cases": [{"input": "1 2\n", "output": "3\n"}]}


def turn(role, content):
    return {"role": role, "content": content}


# layout -> rows as published, and what stays: (answer or tests), by reward
ROWS = {
    "deepscaler": (
        [
            {"problem": "2 + 2?", "answer": "4", "solution": "..."},
            {"problem": "2 + 2?", "answer": "4", "solution": "twice"},
            {"problem": "Prove it.", "answer": "", "solution": "..."},
        ],
        [("math", "4")],
        {"the same prompt is there already": 1, "no answer": 1},
    ),
    "skywork-or1": (
        [
            {
                "data_source": "train-math",
                "prompt": [turn("user", "Half of 3?")],
                "ability": "math",
                "reward_model": {"ground_truth": '["\\\\frac{3}{2}"]', "style": "rule"},
            },
            {
                "data_source": "train-code",
                "prompt": [turn("user", "Add.")],
                "ability": "code",
                "reward_model": {
                    "ground_truth": json.dumps({"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}),
                    "style": "rule",
                },
            },
        ],
        [("math", "\\frac{3}{2}"), ("code", ADD)],
        {},
    ),
    "intellect-2": (
        [
            {"task_type": "verifiable_math", "prompt": "1+1", "verification_info": '{"ground_truth": "2"}'},
            {
                "task_type": "verifiable_code",
                "prompt": "Add two numbers.",
                "verification_info": json.dumps(
                    {
                        "language": "python",
                        "test_cases": [{"type": "stdin_stdout", "input": "1 2\n", "output": "3\n", "fn_name": None}],
                    }
                ),
            },
            {"task_type": "verifiable_code", "prompt": "In C.", "verification_info": '{"language": "c"}'},
            {"task_type": "llm_judgeable", "prompt": "Write a poem.", "verification_info": "{}"},
        ],
        [("math", "2"), ("code", ECHO)],
        {"another language than Python": 1, "neither math nor code": 1},
    ),
    "deepcoder": (
        [
            {
                "problem": "Add (taco).",
                "solutions": ["..."],
                "tests": json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]}),
            },
            {
                "problem": "Add (lcb).",
                "solutions": ["..."],
                "tests": json.dumps(
                    [{"input": "1\n2", "output": "3", "testtype": "functional", "metadata": {"func_name": "add"}}]
                ),
                "starter_code": "class Solution:\n    def add(self, a, b):",
            },
            {
                "problem": "Add (primeintellect).",
                "solutions": ["..."],
                "tests": json.dumps([{"type": "function_call", "fn_name": "add", "input": [1, 2], "output": [3]}]),
            },
            {"problem": "No tests.", "solutions": ["..."], "tests": "[]"},
        ],
        [("code", ECHO), ("code", ADD), ("code", ADD)],
        {"no tests": 1},
    ),
    "opencodeinstruct": (
        [
            {
                "input": f"Add, {score}.",
                "output": "...",
                "unit_tests": json.dumps([test]),
                "average_test_score": score,
            }
            for score, test in (
                ("1.0", "assert add(1, 2) == 3"),
                ("0.5", "assert add(1, 2) == 3"),
                ("1", "assert abs(add(1.0, 2.0) - 3) < 1e-6"),
            )
        ],
        [("code", ADD)],
        {"its own program fails a test": 1, "an assertion that compares no call with a literal": 1},
    ),
    "nemotron-stem": (
        [
            {
                "uuid": str(n),
                "category": category,
                "messages": [
                    turn("user", f"Question {n}?" + "\n(A) u\n(C) v" * (n == 0)),
                    turn("assistant", f"<think>...</think> It is \\boxed{{{a}}}."),
                ],
                "metadata": metadata,
            }
            for n, (category, a, metadata) in enumerate(
                [
                    ("stem", "C", "{}"),
                    ("stem", "x", '{"expected_answer": "12"}'),
                    ("math", "1", "{}"),
                    ("stem", "\\frac{1}{2}", "{}"),
                    ("stem", "B", "{}"),  # a magnetic field: nothing is listed
                ]
            )
        ],
        [("choice", "C"), ("math", "12"), ("math", "\\frac{1}{2}"), ("math", "B")],
        {"another category than stem": 1},
    ),
    "livecodebench": (
        [
            {
                "question_content": "Add.",
                "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
                "private_test_cases": private,
                "starter_code": "",
                "metadata": "{}",
            }
            for private in ("[]", "eJxrYJmqyg==")
        ],
        [("code", ECHO)],
        {"private tests that are no JSON: import the data set's decoded release": 1},
    ),
    "codeforces": (
        [
            {
                "description": "Add.",
                "input_format": "Two numbers.",
                "output_format": "One.",
                "official_tests": [{"input": "1 2\n", "output": "3\n"}],
            }
        ],
        [("code", ECHO)],
        {},
    ),
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_row_becomes_a_prompt_or_is_left_out_by_reason(layout, kind, tmp_path, capsys):
    rows, kept, left_out = ROWS[layout]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    out = tmp_path / "prompts.jsonl"
    assert import_prompts.main([str(path), "--out", str(out)]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(record["reward"], record.get("answer") or record["tests"]) for record in found] == kept
    assert all(record["metadata"]["source"] == layout for record in found)
    said = capsys.readouterr().out
    assert all(f"left out: {number:,}: {reason}" in said for reason, number in left_out.items())
    assert said.count("left out") == len(left_out)


def test_a_gold_that_its_own_reward_would_not_accept_is_left_out(tmp_path, capsys):
    rows = [{"problem": str(n), "answer": answer, "solution": ""} for n, answer in enumerate(("7", "\\boxed{}", "5"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert import_prompts.main([str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl")]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    assert "left out: 1: the reward math does not take it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ('{"question": "1"}\n', [], "rows.jsonl, line 1: the columns question are that of none; name the layout"),
        ('{"question": "1"}\n', ["--layout", "deepscaler"], "line 1: no column problem of deepscaler; it has question"),
        ('{"problem": "1", "answer"\n', [], "rows.jsonl, line 1"),
        ('{"problem": "1", "answer": "", "solution": ""}\n', [], "none of the rows is a prompt (1: no answer)"),
    ],
)
def test_what_is_no_prompt_set_is_refused_and_nothing_is_written(content, arguments, message, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(content)
    out = tmp_path / "out.jsonl"
    assert import_prompts.main([str(tmp_path / "rows.jsonl"), "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.glob("out*"))


def test_what_a_function_returns_is_unwrapped_where_a_set_wraps_it():
    """A list of one that is really returned stays one: LiveCodeBench wraps nothing, and APPS wraps all or none."""
    functional = {"testtype": "functional", "metadata": {"func_name": "f"}}
    lcb = program_tests([{"input": "[1]", "output": "[3]", **functional}])
    assert lcb["cases"] == [{"args": [[1]], "expected": [3]}]
    apps = program_tests({"fn_name": "f", "inputs": [[1], [2]], "outputs": [[3], ["4"]]})
    assert [case["expected"] for case in apps["cases"]] == [3, "4"]
    bare = program_tests({"fn_name": "f", "inputs": [[1], [2]], "outputs": [[3], [4, 5]]})
    assert [case["expected"] for case in bare["cases"]] == [[3], [4, 5]]
    for tests in ({"inputs": ["1", "2"], "outputs": ["1"]}, {"inputs": "12", "outputs": "34"}, [{"input": "1"}]):
        with pytest.raises(NotUsable):
            program_tests(tests)


def test_values_of_another_kind_are_left_out_and_what_json_has_not_is_refused(tmp_path, capsys):
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows = [
        {"task_type": "verifiable_math", "prompt": "a", "verification_info": "[1]"},
        {"task_type": None, "prompt": "b", "verification_info": "{}"},
        {"task_type": "verifiable_math", "prompt": "c", "verification_info": '{"ground_truth": NaN}'},
        {"task_type": "verifiable_math", "prompt": "d", "verification_info": '{"ground_truth": "\\ud800"}'},
        {"task_type": "verifiable_math", "prompt": "e", "verification_info": '{"ground_truth": 7}'},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert import_prompts.main([str(path), "--out", str(out)]) == 0
    assert [json.loads(line)["prompt"] for line in out.read_text().splitlines()] == ["e"]
    assert "left out: 1: a value of another kind than intellect-2 has there (AttributeError)" in capsys.readouterr().out
    for bad in ('{"problem": "\\ud800", "answer": "1", "solution": ""}', "[" * 100_000):
        path.write_text(bad + "\n")
        assert import_prompts.main([str(path), "--out", str(out)]) == 2
        assert "rows.jsonl, line 1" in capsys.readouterr().err


def test_tests_that_cannot_be_told_apart_are_not_guessed():
    mixed = [{"type": "stdin_stdout", "input": "", "output": ""}, {"type": "function_call", "input": [], "output": 1}]
    for tests in ([], "nothing", mixed, [{"type": "function_call", "input": [1], "output": 1}]):
        with pytest.raises(NotUsable):
            program_tests(tests)
