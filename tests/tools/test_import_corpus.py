"""tools/import_corpus.py on rows of our own in the published layouts: what stays, what it becomes, what is refused."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from prism_mcore.config import load
from prism_mcore.data import published
from prism_mcore.data.corpus import parse
from prism_mcore.data.published import CORPORA
from prism_mcore.train.settings import MidtrainSettings

ROOT = Path(__file__).parents[2]

spec = importlib.util.spec_from_file_location("import_corpus", ROOT / "tools" / "import_corpus.py")
import_corpus = importlib.util.module_from_spec(spec)
spec.loader.exec_module(import_corpus)


def chat(question: str, answer: str, role: str = "role", content: str = "content") -> list[dict[str, str]]:
    names = ("human", "gpt") if role == "from" else ("user", "assistant")
    return [{role: names[0], content: question}, {role: names[1], content: answer}]


def code(number: int, fence: str, **columns: str) -> dict[str, str]:
    answer = f"<think>\nloop\n</think>\n```{fence}\nx = {number}\n```"
    row = {"id": f"{number}", "question_id": f"q{number}", "question": f"Print {number}.", "r1_generation": answer}
    return row | {"judgement": "right", "pass_rate": "0.9", "qwq_critique": "..."} | columns


# name -> rows as published, and the documents that stay
LAYOUTS: dict[str, tuple[list[dict], list[dict]]] = {
    "dclm-edu": (
        [{"id": str(n), "text": f"page {n}", "edu_int_score": n, "edu_score": n + 0.1} for n in (2, 3, 4)],
        [{"text": "page 3"}, {"text": "page 4"}],
    ),
    "wildchat-1m-gpt4": (
        [
            {"conversation_hash": m, "model": m, "conversation": chat("hi", f"I am {m}"), "turn": 1, "toxic": False}
            for m in ("gpt-3.5-turbo-0613", "gpt-4-0314", "gpt-4-1106-preview")
        ],
        [{"messages": chat("hi", f"I am {m}")} for m in ("gpt-4-0314", "gpt-4-1106-preview")],
    ),
    "tulu-3-personas": (
        [{"id": s, "messages": chat("a", s), "source": s} for s in ("ai2-adapt-dev/personahub_math_v5", "flan_v2")],
        [{"messages": chat("a", "ai2-adapt-dev/personahub_math_v5")}],
    ),
    "ultrachat-200k": (
        [{"prompt": "a", "prompt_id": "1", "messages": chat("a", "b")}] * 2,
        [{"messages": chat("a", "b")}],  # the second is there already
    ),
    "nemotron-post-training-v1-math": (
        [{"uuid": c, "category": c, "reasoning": "on", "messages": chat("1+1?", c)} for c in ("math", "code")],
        [{"text": "1+1?\nmath"}],
    ),
    "mixture-of-thoughts-science": (
        [{"messages": chat("Why?", "<think>\nwell\n</think>\nSo."), "num_tokens": 9, "source": "x"}],
        [{"text": "Why?\n<think>\nwell\n</think>\nSo."}],
    ),
    "megamath-web-pro": ([{"text": "2 + 2 = 4", "url": "x"}], [{"text": "2 + 2 = 4"}]),
    "opencodereasoning-2": (
        [code(1, "python"), code(2, "cpp", judgement="wrong"), code(3, "cpp", pass_rate="-1"), code(4, "cpp")],
        [{"text": f"Print {n}.\n{code(n, f)['r1_generation']}"} for n, f in ((4, "cpp"), (1, "python"))],
    ),
    "starcoder2": ([{"content": "int main;", "max_stars_repo_path": "a.c"}], [{"text": "int main;"}]),
    "openthoughts3-science": (
        [
            {"difficulty": None, "source": "x", "domain": d, "conversations": chat("Q", d, "from", "value")}
            for d in ("science", "math")
        ],
        [{"text": "Q\nscience"}],
    ),
}


def run(name: str, out: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/import_corpus.py", name, *map(str, arguments), "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_the_paper_keeps_becomes_documents(tmp_path, name, kind):
    rows, wanted = LAYOUTS[name]
    counts = import_corpus.write(name, [str(write(tmp_path / f"a.{kind}", rows))], tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found == wanted
    assert sum(counts.values()) == len(rows) and counts["documents"] == len(wanted)
    for record in found:
        parse(record, "text")  # tokenize_corpus.py takes it


def test_every_source_of_the_papers_mixtures_has_a_layout():
    parts = ROOT / "launch/recipes/paper/parts"
    paths = {s.path for m in ("m", "mc", "mcs") for s in load(MidtrainSettings, parts / f"{m}.yaml").data.sources}
    assert {Path(path).name for path in paths} - {"refinecode"} == set(CORPORA)
    assert set(CORPORA) - set(LAYOUTS) == {"mixture-of-thoughts-math", "mixture-of-thoughts-code"}  # as science's


def test_the_sample_does_not_depend_on_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(import_corpus, "SAMPLED", 5)
    rows = [code(n, fence) for n in range(40) for fence in ("python", "cpp")]
    import_corpus.write("opencodereasoning-2", [str(write(tmp_path / "a.jsonl", rows))], tmp_path / "a")
    random.Random(0).shuffle(rows)
    import_corpus.write("opencodereasoning-2", [str(write(tmp_path / "b.jsonl", rows))], tmp_path / "b")
    lines = (tmp_path / "a").read_text().splitlines()
    assert (tmp_path / "b").read_text().splitlines() == lines
    assert len(lines) == 10 and sum("```cpp" in line for line in lines) == 5
    assert published.SAMPLED == 60_000


def test_questions_that_are_left_out_are_asked_for_and_taken(tmp_path):
    rows = write(tmp_path / "a.jsonl", [code(7, "python", question="-")])
    done = run("opencodereasoning-2", tmp_path / "out.jsonl", rows)
    assert done.returncode == 2 and "a.jsonl, line 1: question q7 is left out" in done.stderr
    assert not (tmp_path / "out.jsonl").exists() and "Traceback" not in done.stderr
    texts = write(tmp_path / "questions.jsonl", [{"question_id": "q7", "question": "Print seven."}])
    done = run("opencodereasoning-2", tmp_path / "out.jsonl", rows, "--questions", texts)
    assert done.returncode == 0 and "1 documents" in done.stdout
    assert (tmp_path / "out.jsonl").read_text().startswith('{"text": "Print seven.\\n<think>')


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("dclm-edu", {"text": "a"}, "no column edu_int_score; it has text"),
        ("ultrachat-200k", {"messages": [{"role": "tool", "content": ""}]}, "messages[0].role='tool'"),
        ("mixture-of-thoughts-math", {"messages": chat("a", "b") * 2}, "needed: user, assistant"),
        ("starcoder2", {"blob_id": "x"}, "publishes blob ids"),
        ("opencodereasoning-2", code(1, "java"), "no program in Python or C++"),
    ],
)
def test_a_row_of_another_layout_is_refused_by_its_place(tmp_path, name, row, message):
    done = run(name, tmp_path / "out.jsonl", write(tmp_path / "a.jsonl", [row]))
    assert done.returncode == 2 and message in done.stderr and "line 1" in done.stderr
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("content", ["", '{"id": "1", "text": "a", "edu_int_score": 1}\n', '{"text": "\\ud800"}\n'])
def test_a_corpus_of_no_document_is_none(content, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(content)
    assert import_corpus.main(["dclm-edu", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "import_corpus: " in capsys.readouterr().err and not list(tmp_path.glob("out*"))
