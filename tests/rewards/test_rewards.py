"""Rewards on responses whose verdict is plain, and the pool that survives those whose verification is not."""

import json
import math
import os
import re
import subprocess
import sys
import time

import psutil
import pytest
import reasoning_gym

from prism_mcore.rewards import REWARDS, Reward, check_record
from prism_mcore.rewards.choice import chosen_letter
from prism_mcore.rewards.format import final_answer, is_formatted, repeated_fraction
from prism_mcore.rewards.settings import RewardSettings
from prism_mcore.rewards.verifier import Verdict, Verifier, reward_parts


@pytest.mark.parametrize(
    ("response", "formatted"),
    [
        ("<think>2 + 2 = 4</think> 4", True),
        (" <think>\n</think>\nfour", True),
        ("4", False),
        ("<think>2 + 2</think>", False),
        ("<think>2 + 2 = 4", False),
        ("So: <think>2 + 2</think> 4", False),
        ("<think>a</think> <think>b</think> 4", False),
        ("</think> 4 <think>", False),
    ],
)
def test_the_format_is_thinking_then_an_answer(response, formatted):
    assert is_formatted(response) is formatted


def test_the_final_answer_follows_the_reasoning():
    assert final_answer("<think>not 3</think> 4 ") == "4"
    assert final_answer("<think>3, still thinking") == ""
    assert final_answer("just 4") == "just 4"


@pytest.mark.parametrize(
    ("answer", "response", "correct"),
    [
        ("1/2", r"<think>x</think> The answer is \boxed{\frac{2}{4}}.", 1.0),
        ("0.5", r"so we get $\frac12$", 1.0),
        (r"\frac{1}{2}", r"\boxed{0.25}", 0.0),
        ("17", "<think>17</think> 18", 0.0),
        ("17", "<think>it is 17", 0.0),
        ("x^2+1", r"\boxed{1 + x^{2}}", 1.0),
        ("7", "", 0.0),
        ("7", r"first \boxed{8}, no: \boxed{7}", 1.0),
    ],
)
def test_mathematics_compares_expressions(answer, response, correct):
    assert REWARDS["math"].function({"answer": answer}, response) == {"correct": correct}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The answer is (B).", "B"),
        (r"\boxed{\text{c}}", "C"),
        ("Answer: **D**", "D"),
        ("(A) is wrong, so (C)", "C"),
        ("B", "B"),
        ("A cat sat", None),
        ("answer: because", None),
        (r"\boxed{AB}", None),
        ("The answer is: B", "B"),
        ("The correct answer is: b.", "B"),
        ("Answer A is right", "A"),
        ("The answer is a prime number. (D)", "D"),
        ("The answer I found is (C).", "C"),
    ],
)
def test_a_choice_is_the_letter_settled_on(answer, letter):
    assert chosen_letter(answer) == letter
    assert REWARDS["choice"].function({"answer": "B"}, answer)["correct"] == float(letter == "B")


@pytest.mark.parametrize("repeated", [" ", "\n", "*", "-\n", "answer is\n", "("])
def test_a_choice_is_looked_for_in_linear_time(repeated):
    """Where a model repeats itself for thousands of tokens; what takes seconds would be masked instead of wrong."""
    begun = time.process_time()
    assert chosen_letter("answer" + repeated * 10_000 + "x") is None
    assert time.process_time() - begun < 1.0


def test_reasoning_gym_scores_with_its_own_scorers():
    record = {"question": "4 + 3 = ?", "answer": "7", "metadata": {"source_dataset": "chain_sum"}}
    assert REWARDS["gym"].function(record, "<think>4 + 3 = 7</think> 7") == {"correct": 1.0}
    for wrong in ("<think>4 + 3 = 7</think> 8", "17", "7 and a half"):
        assert REWARDS["gym"].function(record, wrong) == {"correct": 0.0}


def gym_record(task, **changes):
    return {"reward": "gym", "answer": "7", "metadata": {"source_dataset": task}} | changes


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"reward": "math", "answer": "2 \\frac{2}{3}"}, None),
        ({"reward": "math", "answer": "\\text{north}"}, None),
        ({"reward": "math", "answer": 7}, None),
        ({"reward": "math", "answer": 0}, None),
        ({"reward": "math", "answer": "He has 4 - 1 = 3 left.\n#### 3"}, None),
        ({"reward": "math", "answer": [7]}, "answer is [7]; needed: one answer, a text or a number"),
        ({"reward": "math", "answer": {"value": 7}}, 'answer is {"value": 7}; needed'),
        ({"reward": "math", "answer": math.nan}, "answer is NaN; needed"),
        ({"reward": "math", "answer": False}, "answer is false; needed"),
        ({"reward": "math", "answer": "\\frac{1}{2"}, "do its braces match?"),
        ({"reward": "math", "answer": None}, "reward math needs 'answer'; the record has answer, reward"),
        ({"reward": "math", "answer": "\t"}, "reward math needs 'answer'"),
        ({"reward": "choice", "answer": "B"}, None),
        ({"reward": "choice", "answer": "(b)"}, None),
        *(
            ({"reward": "choice", "answer": wrong}, "needed: the letter of the right choice, A to J")
            for wrong in ("L", 1, "C. Rome", "Rome", ["A"], "AB")
        ),
        (gym_record("chain_sum"), None),
        (gym_record("chain_summ"), 'metadata.source_dataset is "chain_summ", which is no task'),
        (gym_record("chain_sum", metadata={"level": 2}), "needed: an object whose source_dataset names the task"),
        (gym_record("chain_sum", metadata="chain_sum"), "needed: an object whose source_dataset names the task"),
        (gym_record("chain_sum", metadata={"source_dataset": 3}), "needed: an object whose source_dataset"),
        (gym_record("chain_sum", answer=7), "answer is 7; needed: a text, as reasoning-gym writes it, or null"),
        (gym_record("chain_sum", answer=None), "reward gym cannot use the record: TypeError"),
        (gym_record("rubiks_cube", answer=None), "reward gym cannot use the record: KeyError: 'cube_size'"),
        (gym_record("rearc", answer="1 2"), "rearc's scorer does not give the record's own answer"),
        ({"reward": "gym", "answer": "7"}, "reward gym needs 'metadata'; the record has answer, reward"),
        ({"answer": "7"}, "reward null; known rewards are math, gym, choice"),
    ],
)
def test_each_reward_tries_its_record_before_a_run(record, problem):
    if problem is None:
        assert check_record(record) == record["reward"]
    else:
        with pytest.raises(ValueError, match=re.escape(problem)):
            check_record(record)


@pytest.mark.parametrize("task", ["boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"])
def test_tasks_without_an_answer_of_their_own_are_taken(task):
    entry = json.loads(json.dumps(reasoning_gym.create_dataset(task, size=1, seed=5)[0]))
    assert entry["answer"] is None and check_record({"reward": "gym", "prompt": entry["question"], **entry}) == "gym"


def test_repetition_is_the_share_of_ngrams_seen_before():
    assert repeated_fraction([1, 2, 3, 4], 2) == 0.0
    assert repeated_fraction([1, 2, 1, 2, 1, 2], 2) == pytest.approx(1 - 2 / 5)
    assert repeated_fraction([1], 2) == 0.0


def test_parts_follow_the_format_rule_and_the_penalties():
    settings = RewardSettings(stop_token_penalty=0.5, repetition_penalty=0.25, repetition_ngram=1)
    right = Verdict(0, "ok", {"correct": 1.0})
    thought = reward_parts(right, "<think>a</think> 4", (1, 2, 3, 4), True, settings)
    assert thought == {"correct": 1.0, "stop_token": 0.0, "repetition": 0.0}
    bare = reward_parts(right, "4 4", (1, 1), False, settings)
    assert bare == {"correct": 0.0, "stop_token": -0.5, "repetition": -0.125}


def misbehave(record, response):
    """A reward that does to its worker what the response says."""
    if response == "hang":
        time.sleep(60)
    if response == "die":
        os._exit(3)
    if response == "raise":
        raise ValueError("what is this?")
    print("libraries print, too")
    return {"correct": 1.0}


@pytest.fixture
def misbehaving(tmp_path, monkeypatch):
    """A worker process that knows one more reward: Python runs this folder's sitecustomize when it starts."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_rewards import misbehave\n"
        "from prism_mcore.rewards import REWARDS, Reward\n"
        "REWARDS['misbehave'] = Reward(misbehave, ())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setitem(REWARDS, "misbehave", Reward(misbehave, ()))


def test_a_response_that_hangs_dies_or_raises_costs_itself_alone(misbehaving):
    with Verifier(workers=2, timeout_s=1.0, rewards=["misbehave"]) as verifier:
        responses = ["fine", "hang", "die", "fine", "raise", "fine", "hang", "fine"]
        for ticket, response in enumerate(responses):
            verifier.submit(ticket, {"reward": "misbehave"}, response)
        verdicts = {verdict.ticket: verdict for verdict in verifier.results(block=True)}
        assert verifier.results() == [] and verifier.outstanding == 0
    expected = {"fine": "ok", "hang": "timeout", "die": "crash", "raise": "crash"}
    assert [verdicts[i].status for i in range(len(responses))] == [expected[r] for r in responses]
    assert all(verdict.parts == ({"correct": 1.0} if verdict.status == "ok" else {}) for verdict in verdicts.values())
    assert not any(worker.process.poll() is None for worker in verifier._workers)


def test_a_hanging_worker_does_not_outlive_a_killed_run(misbehaving):
    program = (
        "import time\n"
        "from prism_mcore.rewards.verifier import Verifier\n"
        "verifier = Verifier(workers=1, timeout_s=60.0)\n"
        "verifier.submit(0, {'reward': 'misbehave'}, 'hang')\n"
        "while verifier._workers[0].ticket is None: time.sleep(0.01)\n"
        "print(verifier._workers[0].process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as run:
        worker = psutil.Process(int(run.stdout.readline()))
        time.sleep(0.2)  # until it hangs
        run.kill()
    assert not psutil.wait_procs([worker], timeout=10)[1]


def test_workers_that_cannot_start_say_what_to_install(monkeypatch):
    monkeypatch.setitem(REWARDS, "missing", Reward(misbehave, (), "no_such_package"))
    with Verifier(workers=1, timeout_s=1.0, rewards=["missing"]) as verifier:
        verifier.submit(0, {"reward": "missing"}, "x")
        for again in (verifier.results, verifier.results, lambda block: verifier.submit(1, {"reward": "missing"}, "x")):
            with pytest.raises(RuntimeError, match="the verifier has stopped") as error:
                again(block=True)
            assert "no_such_package: pip install" in str(error.value.__cause__)


def test_a_worker_that_does_not_start_again_at_once_costs_nothing(misbehaving, tmp_path):
    """What was killed is started again; where that fails, too, for want of memory perhaps, it is tried once more."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nplaces = {str(tmp_path / 'starts')!r}\n"
        "number = os.open(places, os.O_CREAT | os.O_APPEND | os.O_WRONLY)\n"
        "os.write(number, b'.')\n"
        "if os.fstat(number).st_size in (2, 3): os._exit(1)\n" + (tmp_path / "sitecustomize.py").read_text()
    )
    with Verifier(workers=1, timeout_s=5.0, rewards=["misbehave"]) as verifier:
        for ticket, response in enumerate(["fine", "die", "fine"]):
            verifier.submit(ticket, {"reward": "misbehave"}, response)
        verdicts = {verdict.ticket: verdict.status for verdict in verifier.results(block=True)}
    assert verdicts == {0: "ok", 1: "crash", 2: "ok"}
    assert (tmp_path / "starts").stat().st_size == 4
