"""Problem files: what is refused, by line; the order of options; prompts in every style."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from prism_mcore.evaluate.problems import ask, order_of, prompt_text, read_problems, stops_of
from prism_mcore.evaluate.tasks import OWN, TASKS, file_of, task_of
from prism_mcore.text import Tokenizer

MATH, CHOICE = TASKS["own-math"], TASKS["own-choice"]
QUESTION = {"id": "a", "question": "1 + 1?", "answer": "2"}
OPTIONS = {"id": "a", "question": "Which?", "choices": ["one", "two", "three", "four"], "answer": 2}

WRONG = {
    "no answer": (MATH, [QUESTION | {"answer": None}], "line 1: reward math needs 'answer'"),
    "a missing column": (MATH, [QUESTION, {"id": "b", "problem": "x", "answer": "1"}], "line 2: no 'question'; own"),
    "no id": (MATH, [{"question": "x", "answer": "1"}], "line 1: no 'id'; own-math needs it, the line has answer"),
    "an empty question": (MATH, [QUESTION | {"question": " "}], 'line 1: question is " "; needed: a text'),
    "twice": (MATH, [QUESTION, QUESTION], "line 2: the question or its id is that of line 1"),
    "the same id": (MATH, [QUESTION, QUESTION | {"question": "2?"}], "line 2: the question or its id is"),
    "one option": (CHOICE, [OPTIONS | {"choices": ["one"]}], "needed: a list of 2 to 10 texts"),
    "a letter": (CHOICE, [OPTIONS | {"answer": "C"}], 'answer is "C"; needed: the right choice\'s place, 0 to 3'),
    "no such option": (CHOICE, [OPTIONS | {"answer": 4}], "answer is 4; needed: the right choice's place, 0 to 3"),
    "no tests": (TASKS["own-code"], [QUESTION], "line 1: no 'tests'; own-code needs it"),
    "no reward": (task_of("my/file.jsonl"), [{"prompt": "1 + 1?", "answer": "2"}], "line 1: no `reward`"),
    "nothing": (MATH, [], "has no questions; needed: one JSON object per line"),
    "too few": (TASKS["aime24"], [QUESTION], "has 1 questions; AIME 2024 has 30; evaluate.partial=true takes it"),
    "too many": (
        TASKS["aime24"],
        [QUESTION | {"id": str(i), "question": f"{i}?"} for i in range(31)],
        "has 31 questions; AIME 2024 has 30",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_cannot_be_used_is_refused_by_line(tmp_path, name):
    task, lines, message = WRONG[name]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError) as error:
        read_problems(file, task, partial=name == "too many")
    assert message in str(error.value) and str(file) in str(error.value)


def test_a_file_that_is_not_there_names_the_tool(tmp_path):
    with pytest.raises(ValueError, match=r"import_benchmark\.py aime24"):
        read_problems(tmp_path / "aime24.jsonl", TASKS["aime24"])
    with pytest.raises(ValueError, match="no such task; known are aime24"):
        task_of("aime")


def test_fewer_than_published_can_be_taken(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(QUESTION))
    assert len(read_problems(tmp_path / "a.jsonl", TASKS["aime24"], partial=True)) == 1


@pytest.mark.parametrize("name", sorted(file.stem for file in OWN.glob("*.jsonl")))
def test_our_own_problems_can_be_graded(name, tmp_path):
    """Reading tries each one's own answer where it has one."""
    assert len(read_problems(file_of(name, tmp_path), TASKS[name])) >= 8


def problem_of(tmp_path, record=OPTIONS, task=CHOICE):
    (tmp_path / "q.jsonl").write_text(json.dumps(record))
    return read_problems(tmp_path / "q.jsonl", task)[0]


def test_options_are_shuffled_by_seed_question_and_sample(tmp_path):
    problem = problem_of(tmp_path)
    golds = Counter(ask(problem, CHOICE, sample).record["answer"] for sample in range(4000))
    assert all(900 < golds[letter] < 1100 for letter in "ABCD")  # 1000 each: 3.6 standard deviations
    assert order_of(problem, 7, 1, "shuffled") == order_of(problem, 7, 1, "shuffled")
    assert len({order_of(problem, sample, 0, "shuffled") for sample in range(200)}) == 24
    assert [order_of(problem, 7, seed, "shuffled") for seed in range(9)] != [order_of(problem, 7, 0, "shuffled")] * 9


def test_an_asked_question_shows_its_options_and_their_right_letter(tmp_path):
    problem = problem_of(tmp_path)
    for sample in range(20):
        asked = ask(problem, CHOICE, sample)
        assert f"\n{asked.record['answer']}) three" in asked.messages[0]["content"]
    given = ask(problem, CHOICE, 0, options="given")
    assert given.record["answer"] == "C" and "\nA) one\nB) two\nC) three\nD) four\n" in given.messages[0]["content"]


@pytest.mark.parametrize("right", range(4))
def test_evalchemys_order_has_the_right_one_at_d_in_every_question(tmp_path, right):
    """evalchemy #155: `random.Random(42)` is made anew for each question, whose right answer comes first."""
    problem = problem_of(tmp_path, OPTIONS | {"answer": right, "question": f"Which of {right}?"})
    assert {ask(problem, CHOICE, s, options="evalchemy").record["answer"] for s in range(9)} == {"D"}


def test_another_word_makes_another_question(tmp_path):
    first, second = problem_of(tmp_path), problem_of(tmp_path, OPTIONS | {"choices": ["one", "two", "three", "4"]})
    assert first.key != second.key and first.key == problem_of(tmp_path).key


def test_a_prompt_of_rl_is_asked_as_it_stands(tmp_path):
    task = task_of("mine.jsonl")
    problem = problem_of(tmp_path, {"prompt": "2 + 2 =", "answer": "4", "reward": "math"}, task)
    assert ask(problem, task, 0).messages == [{"role": "user", "content": "2 + 2 ="}]


def test_prompts_in_every_style():
    bare = Tokenizer(Backend(models.WordLevel({"a": 0}, unk_token="a")))
    messages = [{"role": "user", "content": "Why?"}]
    assert prompt_text(messages, bare, "auto") == ("User: Why?\nAssistant:", False)
    assert prompt_text(messages, bare, "plain") == ("Why?", False)
    assert stops_of(bare, "auto") == ["\nUser:"] and stops_of(bare, "plain") == []
    bare.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant><think>"
    assert prompt_text(messages, bare, "auto") == ("<user>Why?<assistant><think>", True)
    assert stops_of(bare, "auto") == [] and stops_of(bare, "turns") == ["\nUser:"]


def test_a_task_is_one_of_its_kind():
    assert {name: task.rows for name, task in TASKS.items() if task.rows}.items() >= {
        ("aime24", 30), ("aime25", 30), ("math500", 500), ("livecodebench", 279), ("codeforces", 453), ("gpqa", 198),
    }  # fmt: skip
    assert all(replace(task, name=name) == task and task.source for name, task in TASKS.items())
