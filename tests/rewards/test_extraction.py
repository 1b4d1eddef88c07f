"""What a response answers: after its reasoning only, in the form that was asked for or another, or not at all."""

import pytest

from prism_mcore.rewards import REWARDS
from prism_mcore.rewards.extraction import answer_of, extract

BLOCK = "```python\nprint(1)\n```"
CASES = [
    ("math", r"<think>no, \boxed{5}</think> So \boxed{7}.", "strict", "7"),
    ("math", "<think>5</think> The answer is 7.", "lenient", "7"),
    ("math", r"<think>it is \boxed{7}", "none", None),
    ("math", r"<think>a</think> \boxed{7} <think>no: \boxed{8}", "strict", "7"),
    ("math", r"\boxed{}", "none", None),
    ("math", "", "none", None),
    ("choice", r"<think>A or B? The answer is A.</think>\boxed{C}", "strict", "C"),
    ("choice", "<think>The answer is A.</think>(C)", "lenient", "C"),
    ("choice", "<think>The answer is A.</think>I do not know.", "none", None),
    ("choice", "<think>The answer is A.", "none", None),
    ("code", f"<think>```python\nno\n```</think>Here:\n{BLOCK}", "strict", "print(1)\n"),
    ("code", "import sys\nprint(1)", "lenient", "import sys\nprint(1)"),
    ("code", "I would sort them.", "none", None),
    ("code", "```python\nprint(1)", "none", None),
    ("gym", r"so \boxed{7}", "strict", "7"),
    ("gym", "7", "lenient", "7"),
]


@pytest.mark.parametrize("reward, response, kind, answer", CASES)
def test_form_and_answer(reward, response, kind, answer):
    assert extract(reward, response)[0] == (kind, answer)
    strict = extract(reward, response, "strict")
    assert strict == ((kind, answer), strict[1]) if kind == "strict" else strict == (("none", None), "")


@pytest.mark.parametrize("reward, response, kind, answer", [case for case in CASES if case[0] in ("math", "choice")])
def test_a_lenient_verdict_is_the_rewards_own(reward, response, kind, answer):
    for gold in ("7", "5", "8") if reward == "math" else ("A", "C"):
        text = extract(reward, response)[1]
        function = REWARDS[reward].function
        if "</think> \\boxed{7} <think>" not in response:  # reasoning that begins again ends an answer here
            assert function({"answer": gold}, text)["correct"] == function({"answer": gold}, response)["correct"]


def test_the_whole_response_is_what_others_look_at():
    """Why a score moves when reasoning is not told apart: an answer that was only considered counts."""
    response = "<think>Perhaps the answer is B.</think>I give up."
    assert extract("choice", response)[0].kind == "none"
    assert extract("choice", response, "whole")[0] == ("lenient", "B")


def test_code_without_a_fence_is_graded_as_it_is():
    assert extract("code", "def f(): return 1")[1] == "```python\ndef f(): return 1\n```"
    assert answer_of("<think>x</think>\n\n    return 1") == "    return 1"
    assert extract("code", "    return 1")[0] == ("lenient", "    return 1")
