"""A published data set as documents of the paper's corpus: `python tools/import_corpus.py NAME FILE --out OUT`.

NAME is one of the sources in launch/recipes/paper/parts/*.yaml; FILE its parquet or JSONL files as published. Filters
are the paper's: DCLM-EDU with a score of 3 and more, WildChat of GPT-4 alone, Tulu 3's personas, math of Nemotron's
post-training data, science of OpenThoughts3, and of OpenCodeReasoning-2 what QwQ judged right and has a pass rate,
60,000 rows of Python and of C++. Documents that are there already, letter for letter, are left out; all that is left
out is counted by reason. A row that lacks a column ends it, with file and row, and nothing is written.

OpenCodeReasoning-2 leaves the questions of others' sets out: --questions FILE.jsonl has {"question_id", "question"}.
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from prism_mcore.console import say
from prism_mcore.data.corpus import CorpusError, expand
from prism_mcore.data.published import CORPORA, SAMPLED, Corpus, rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(CORPORA), metavar="NAME", help=", ".join(CORPORA))
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="parquet, .jsonl, .jsonl.gz or .jsonl.zst; or a pattern"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="documents, one a line")
    parser.add_argument("--questions", type=Path, metavar="FILE.jsonl", help="texts of questions that are left out")
    options = parser.parse_args(arguments)
    try:
        counts = write(options.name, options.files, options.out, options.questions)
    except (ValueError, OSError) as error:  # CorpusError is a ValueError
        say(f"import_corpus: {error}", stderr=True)
        return 2
    say(f"{options.out}: " + ", ".join(f"{number:,} {reason}" for reason, number in counts.items()))
    return 0


def write(name: str, files: list[str], out: Path, questions: Path | None = None) -> Counter[str]:
    """Write the documents; returns how many were kept, and left out for what. `out` is there when all of it is."""
    corpus, counts = CORPORA[name], Counter[str]({"documents": 0})
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            found = kept(corpus, files, _questions(questions), counts)
            (_write_sample if corpus.group else _write_all)(found, stream, counts)
        if not counts["documents"]:
            left = ", ".join(f"{number:,} {reason}" for reason, number in counts.items() if number)
            raise CorpusError(f"none of the rows is kept ({left or 'there is none'})")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return counts


def kept(
    corpus: Corpus, files: list[str], questions: Mapping[str, str], counts: Counter[str]
) -> Iterator[tuple[str, str]]:
    """(group, line) of each row that stays; `counts` hears of the others. Raises CorpusError, naming file and row."""
    seen: set[bytes] = set()
    for path in expand(files):
        for where, row in rows(path):
            if missing := [column for column in corpus.columns if column not in row]:
                raise CorpusError(f"{where}: no column {missing[0]}; it has {', '.join(map(str, row))}")
            try:
                if reason := corpus.keep(row):
                    counts[reason] += 1
                    continue
                if row.get("question_id") in questions:
                    row = {**row, "question": questions[row["question_id"]]}
                line = json.dumps(corpus.make(row), ensure_ascii=False)
                group = corpus.group(row) if corpus.group else ""
            except (ValueError, TypeError, KeyError) as error:
                raise CorpusError(f"{where}: {error}") from error
            digest = hashlib.blake2b(line.encode(), digest_size=12).digest()
            if digest in seen:
                counts["there already"] += 1
                continue
            seen.add(digest)
            yield group, line


def _write_all(found: Iterator[tuple[str, str]], stream: TextIO, counts: Counter[str]) -> None:
    for _, line in found:
        stream.write(line + "\n")
        counts["documents"] += 1


def _write_sample(found: Iterator[tuple[str, str]], stream: TextIO, counts: Counter[str]) -> None:
    """SAMPLED of each group, those of the smallest hashes: the same whatever the order of rows and files."""
    groups: dict[str, list[tuple[bytes, str]]] = {}
    for group, line in found:
        chosen = groups.setdefault(group, [])
        chosen.append((hashlib.blake2b(line.encode(), digest_size=12).digest(), line))
        if len(chosen) >= 2 * SAMPLED:
            counts["not drawn"] += _cut(chosen)
    for group in sorted(groups):
        counts["not drawn"] += _cut(groups[group])
        for _, line in groups[group]:
            stream.write(line + "\n")
        counts["documents"] += len(groups[group])


def _cut(chosen: list[tuple[bytes, str]]) -> int:
    before = len(chosen)
    chosen.sort()
    del chosen[SAMPLED:]
    return before - len(chosen)


def _questions(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    found: dict[str, Any] = {}
    for where, row in rows(str(path)):
        if not isinstance(row.get("question_id"), str) or not isinstance(row.get("question"), str):
            raise CorpusError(f"{where}: needed: question_id and question, both texts")
        found[row["question_id"]] = row["question"]
    return found


if __name__ == "__main__":
    sys.exit(main())
