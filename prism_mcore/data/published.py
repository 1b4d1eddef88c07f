"""PRISM's mid-training corpora as they are published: which rows it keeps, and what document each becomes.

Columns are those of the data sets' pages on Hugging Face; filters and joining are the paper's (section 3.1). Questions
and answers are joined by one newline, chats stay turns, which tokenising writes as `User: ` and `Assistant: `.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prism_mcore.data.corpus import CorpusError, read_chunks
from prism_mcore.json_lines import parse_object

Row = Mapping[str, Any]
Record = dict[str, Any]  # {"text": ...} or {"messages": [...]}

SAMPLED = 60_000  # OpenCodeReasoning-2's rows of each language
LANGUAGES = {"python": "python", "py": "python", "python3": "python", "cpp": "cpp", "c++": "cpp"}
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+#]+)", re.MULTILINE)


@dataclass(frozen=True)
class Corpus:
    """One data set. `keep` says why a row is left out, or nothing; `group` the sample that it belongs to."""

    columns: tuple[str, ...]
    make: Callable[[Row], Record]
    keep: Callable[[Row], str] = lambda row: ""
    group: Callable[[Row], str] | None = None  # of each group SAMPLED rows are drawn


def text_of(column: str) -> Callable[[Row], Record]:
    def make(row: Row) -> Record:
        return {"text": _text(row, column)}

    return make


def _text(row: Row, column: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"{column} is {type(row[column]).__name__}, not a text")
    return row[column]


def turns(column: str, role: str = "role", content: str = "content") -> Callable[[Row], Record]:
    """A chat; whoever asks is called user, whoever answers assistant."""
    names = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}

    def make(row: Row) -> Record:
        found = []
        for number, turn in enumerate(row[column]):
            if turn[role] not in names:
                raise ValueError(f"{column}[{number}].{role}={turn[role]!r}; known: {', '.join(names)}")
            found.append({"role": names[turn[role]], "content": _text(turn, content)})
        return {"messages": found}

    return make


def question_and_answer(column: str, role: str = "role", content: str = "content") -> Callable[[Row], Record]:
    """The first question and its answer, joined by one newline; a system's turn before them is left out."""
    chat = turns(column, role, content)

    def make(row: Row) -> Record:
        said = [turn for turn in chat(row)["messages"] if turn["role"] != "system"]
        if [turn["role"] for turn in said] != ["user", "assistant"]:
            raise ValueError(f"{column} has turns of {[turn['role'] for turn in said]}; needed: user, assistant")
        return {"text": f"{said[0]['content']}\n{said[1]['content']}"}

    return make


def equals(column: str, wanted: str) -> Callable[[Row], str]:
    return lambda row: "" if row[column] == wanted else f"{column} is not {wanted}"


def _edu(row: Row) -> str:
    return "" if float(row["edu_int_score"]) >= 3 else "score below 3"


def _gpt4(row: Row) -> str:
    return "" if str(row["model"]).startswith("gpt-4") else "not of GPT-4"


def _persona(row: Row) -> str:
    source = row.get("source")  # of the mixture; files of a persona set alone have none
    return "" if source is None or "persona" in source else "not of personas"


def _judged(row: Row) -> str:
    if row["judgement"] != "right":
        return "judged wrong"
    return "" if row["pass_rate"] is not None and float(row["pass_rate"]) != -1 else "no pass rate"


def language(row: Row) -> str:
    """What the program of an answer is written in: its last fence says so."""
    fences = _FENCE.findall(row["r1_generation"])
    found = LANGUAGES.get(fences[-1].lower()) if fences else None
    if found is None:
        raise ValueError(f"r1_generation has no program in Python or C++ (fences: {fences})")
    return found


def _code_answer(row: Row) -> Record:
    question = _text(row, "question")
    if question.strip() in ("", "-"):
        raise ValueError(
            f"question {row['question_id']} is left out of the published file; give its text with --questions"
        )
    return {"text": f"{question}\n{_text(row, 'r1_generation')}"}


def _source_file(row: Row) -> Record:
    if "content" not in row:
        raise ValueError("no column content: The Stack v2 publishes blob ids; fetch the files' contents first")
    return {"text": _text(row, "content")}


CORPORA: dict[str, Corpus] = {
    "dclm-edu": Corpus(("text", "edu_int_score"), text_of("text"), _edu),
    "wildchat-1m-gpt4": Corpus(("model", "conversation"), turns("conversation"), _gpt4),
    "tulu-3-personas": Corpus(("messages",), turns("messages"), _persona),
    "ultrachat-200k": Corpus(("messages",), turns("messages")),
    "nemotron-post-training-v1-math": Corpus(
        ("messages", "category"), question_and_answer("messages"), equals("category", "math")
    ),
    "mixture-of-thoughts-math": Corpus(("messages",), question_and_answer("messages")),
    "mixture-of-thoughts-code": Corpus(("messages",), question_and_answer("messages")),
    "mixture-of-thoughts-science": Corpus(("messages",), question_and_answer("messages")),
    "megamath-web-pro": Corpus(("text",), text_of("text")),
    "opencodereasoning-2": Corpus(
        ("question_id", "question", "r1_generation", "judgement", "pass_rate"), _code_answer, _judged, language
    ),
    "starcoder2": Corpus((), _source_file),
    "openthoughts3-science": Corpus(
        ("domain", "conversations"),
        question_and_answer("conversations", "from", "value"),
        equals("domain", "science"),
    ),
}


def rows(path: str) -> Iterator[tuple[str, Row]]:
    """(`file, row n`, row) of a parquet or JSONL file. Raises CorpusError where it is truncated or damaged."""
    if path.endswith(".parquet"):
        yield from _parquet_rows(path)
        return
    for chunk in read_chunks(path, "text"):
        for number, line in enumerate(chunk.records, start=chunk.first):
            assert isinstance(line, bytes)
            if line.strip():
                try:
                    yield f"{path}, line {number}", parse_object(line)
                except ValueError as error:
                    raise CorpusError(f"{path}, line {number}: {error}") from error


def _parquet_rows(path: str) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path, page_checksum_verification=True).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{path}: damaged after row {number}: {error}; get the file again") from error
