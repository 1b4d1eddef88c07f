"""The demo corpus: its domains, the same every time, its worked answers true line by line."""

import importlib.util
import json
import random
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")
pytest.importorskip("periodictable")

TOOL = Path(__file__).parents[2] / "tools" / "make_demo_corpus.py"
SIZE_MB = 0.15
EQUATION = re.compile(r"(-?[\d.]+(?: [-+*/] -?[\d.]+)+) (=|≈) (-?[\d.]+)")


def load_tool():
    spec = importlib.util.spec_from_file_location("make_demo_corpus", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("demo")
    tool.make_corpus(folder, SIZE_MB, seed=1)
    return {path.stem: [json.loads(line) for line in path.open()] for path in sorted(folder.iterdir())}


def worked(records: list[dict]) -> list[tuple[str, list[str], str]]:
    """(question, steps, answer) of the records with a worked answer."""
    found = []
    for record in records:
        question, reply = (message["content"] for message in record["messages"])
        if match := re.fullmatch(r"<think>\n(.*)\n</think>\n(.*)", reply, re.DOTALL):
            found.append((question, match[1].split("\n"), match[2]))
    return found


def value(expression: str) -> Fraction:
    """A chain of numbers and + - * / with the usual precedence, exactly."""
    exact = re.sub(r"\d+(?:\.\d+)?", lambda number: f"Fraction('{number[0]}')", expression)
    return eval(exact, {"Fraction": Fraction})


PROMPTS = ["sums-held-out", "sums-prompts"]


def test_all_files_are_there_and_not_larger_than_asked(corpus):
    assert sorted(corpus) == ["code", "general", "math", "science", "sums", "sums-bare", *PROMPTS]
    for name, records in corpus.items():
        size = sum(len(json.dumps(record, ensure_ascii=False).encode()) + 1 for record in records)
        assert (size > SIZE_MB * 1e6 * 0.2 or name in PROMPTS) and size <= SIZE_MB * 1e6, name


def test_bare_sums_are_the_same_problems_without_their_working(corpus):
    shown = corpus["sums"]
    assert 0.2 < len(worked(shown)) / len(shown) < 0.4 and not worked(corpus["sums-bare"])
    for record, bare in zip(shown, corpus["sums-bare"], strict=False):  # working takes room: there are fewer
        (question, reply), (same, answer) = ([m["content"] for m in r["messages"]] for r in (record, bare))
        assert question == same and reply.rsplit("\n", 1)[-1] == answer
    for question, steps, answer in worked(shown):
        assert question.endswith(f" {steps[0].split(' = ')[0]} =") and steps[0].endswith(f" = {answer}")


def test_held_out_sums_are_among_the_documents_and_not_among_the_prompts(corpus):
    prompts, held_out = ({record["prompt"] for record in corpus[name]} for name in reversed(PROMPTS))
    assert len(prompts) + len(held_out) == 200 and not prompts & held_out and len(held_out) > 25
    documents = {record["messages"][0]["content"] for record in corpus["sums"]}
    assert held_out <= documents


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tool.make_corpus(tmp_path / name, 0.05, seed)
    for file in set(tool.FILES) - set(PROMPTS):
        a, b, c = ((tmp_path / name / f"{file}.jsonl").read_bytes() for name in "abc")
        assert a == b != c


@pytest.mark.parametrize("domain", ["math", "science"])
def test_every_equation_of_the_working_is_true(corpus, domain):
    checked = 0
    for _, steps, _ in worked(corpus[domain]):
        for step in steps:
            for left, sign, right in EQUATION.findall(step):
                gap = abs(value(left) - Fraction(right))
                assert gap == 0 if sign == "=" else gap <= Fraction(1, 20), step
                checked += 1
    assert checked > 200


def test_the_working_ends_in_the_answer(corpus):
    for question, steps, answer in worked(corpus["math"]):
        last = steps[-1]
        if "fraction" in question:
            top, bottom = re.findall(r"\d+", answer)
            assert steps[-2].endswith(f"= {top}") and last.endswith(f"= {bottom}")
        elif "factorization" in question:
            assert last == f"{answer.split()[-1]} is prime"
        else:
            assert Decimal(last.split(" = ")[-1]) == Decimal(answer), (question, steps, answer)


def test_reasoning_gym_agrees_with_every_answer(corpus):
    """The answers shown are those the library itself scores as right: worked and bare ones come from the same tasks."""
    import reasoning_gym

    for task, work in tool.WORKED.items():
        dataset = reasoning_gym.create_dataset(task, size=50, seed=5)
        for problem in dataset:
            assert work(problem["metadata"]), task
            assert dataset.score_answer(problem["answer"], problem) == 1.0


def test_math_has_worked_and_bare_answers(corpus):
    share = len(worked(corpus["math"])) / len(corpus["math"])
    assert 0.4 < share < 0.7


def test_molar_masses_agree_with_periodictable(corpus):
    import periodictable

    asked = [(question, answer) for question, _, answer in worked(corpus["science"]) if "molar mass" in question]
    assert len(asked) > 20
    for question, answer in asked:
        formula = next(word for word in question.split() if word.rstrip(".") in tool._COMPOUNDS)
        assert float(answer) == pytest.approx(periodictable.formula(formula.rstrip(".")).mass, abs=0.02)


def test_code_and_general_do_not_share_files():
    general, code = (set(tool._library_files(random.Random(0), half)) for half in (0, 1))
    assert len(general) > 100 and len(code) > 100 and not general & code
