"""The miniature study's corpus: what is asked in the end occurs nowhere before."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    sys.path.insert(0, str(TOOLS))  # where the tool finds make_demo_corpus
    try:
        spec = importlib.util.spec_from_file_location("make_study_corpus", TOOLS / "make_study_corpus.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOLS))
    folder = tmp_path_factory.mktemp("corpus")
    assert module.main(["--out", str(folder), "--no-packages"]) == 0
    return module, {path.stem: [json.loads(line) for line in path.open()] for path in folder.glob("*.jsonl")}


def asked(records: list[dict]) -> set[str]:
    return {record["messages"][0]["content"] if "messages" in record else record["prompt"] for record in records}


def test_no_stage_sees_what_is_held_out(corpus):
    module, files = corpus
    assert len(files["math-prompts"]) + len(files["math-held-out"]) == len(module.PAIRS) == 200
    pairs = [module.sum_of(pair)[0] for pair in module.PAIRS if module.held_out(pair)]
    assert len(pairs) == len(files["math-held-out"])
    seen = asked(files["math"]) | asked(files["math-prompts"])
    assert not {" ".join(map(str, _terms(text))) for text in seen} & set(pairs)
    for kind, templates in (("math", module.SUMS), ("science", module.PROTONS)):
        early = asked(files[kind]) | asked(files[f"{kind}-prompts"])
        for template in templates[-2:]:
            before, after = template.split("{}")
            assert not [text for text in early if text.startswith(before) and text.endswith(after)]
            assert any(text.startswith(before) for text in asked(files[f"{kind}-held-out"]))


def test_answers_are_right_and_elements_stand_in_the_science_alone(corpus):
    import periodictable

    _, files = corpus
    for record in files["science-held-out"]:
        name = next(name for name in record["prompt"].rstrip("?.").split() if name in vars(periodictable))
        assert getattr(periodictable, name).number == int(record["answer"])
    for record in files["math-held-out"]:
        a, sign, b = _terms(record["prompt"])
        assert int(record["answer"]) == (a + b if sign == "+" else a - b)
    assert not any("protons" in record["messages"][0]["content"] for record in files["math"])


def _terms(text: str) -> tuple[int, str, int]:
    words = text.replace("?", "").replace(".", "").split()
    place = next(i for i, word in enumerate(words) if word in "+-" and i)
    return int(words[place - 1]), words[place], int(words[place + 1])


def test_the_same_files_every_time(corpus):
    module, files = corpus
    again = [record["prompt"] for record in module.science_prompts(last=True)(module.random.Random("science-held-out"))]
    assert again == [record["prompt"] for record in files["science-held-out"]]
