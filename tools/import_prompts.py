"""A published prompt set as prompts for RL: `python tools/import_prompts.py FILE [FILE ...] --out OUT.jsonl`.

FILE is what its authors publish, parquet or JSONL: DeepScaleR, Skywork-OR1, INTELLECT-2, DeepCoder, OpenCodeInstruct,
Nemotron's post-training stem, and programs in LiveCodeBench's or Codeforces' shape. The layout is told by the columns,
or named (--layout). Each line of OUT has `prompt`, `reward` and its `answer` or `tests`, and under `metadata` where it
is from. Rows that cannot be used are left out and counted by reason; among them those whose own answer the reward would
not accept, and prompts that are there already. A damaged file ends it, by file and row, and nothing is written.
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prism_mcore.console import say
from prism_mcore.data.corpus import CorpusError, expand
from prism_mcore.data.published import rows
from prism_mcore.json_lines import parse_object
from prism_mcore.rewards import check_record
from prism_mcore.rl.published import LAYOUTS, NotUsable, layout_of


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="parquet, .jsonl, .jsonl.gz or .jsonl.zst; or a pattern"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.jsonl", help="prompts, one a line")
    parser.add_argument("--layout", choices=sorted(LAYOUTS), metavar="NAME", help=", ".join(LAYOUTS))
    parser.add_argument("--limit", type=int, metavar="N", help="stop after so many prompts")
    options = parser.parse_args(arguments)
    try:
        if options.out.is_dir() or not options.out.resolve().parent.is_dir():
            raise ValueError(f"--out {options.out}: needed: a file in a folder that is there")
        if options.limit is not None and options.limit < 1:
            raise ValueError(f"--limit {options.limit}: needed: at least 1")
        counts = write(options.files, options.out, options.layout, options.limit)
    except (ValueError, OSError) as error:  # CorpusError is a ValueError
        say(f"import_prompts: {error}", stderr=True)
        return 2
    kept = counts.pop("prompts")
    say(f"{options.out}: {kept:,} prompts")
    for reason, number in counts.most_common():
        say(f"left out: {number:,}: {reason}")
    return 0


def write(files: list[str], out: Path, layout: str | None = None, limit: int | None = None) -> Counter[str]:
    """Write the prompts; how many, and what was left out for which reason. `out` is there when all of it is."""
    counts = Counter[str]({"prompts": 0})
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            for record in records(files, layout, counts):
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                counts["prompts"] += 1
                if counts["prompts"] % 10_000 == 0:
                    say(f"{counts['prompts']:,} prompts", stderr=True)
                if counts["prompts"] == limit:
                    break
        if not counts["prompts"]:
            reasons = "; ".join(f"{number:,}: {reason}" for reason, number in counts.most_common() if number)
            raise ValueError(f"none of the rows is a prompt ({reasons or 'there is none'})")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return counts


def records(files: list[str], layout: str | None, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The prompts of all files; `counts` hears of what is left out. Raises CorpusError, naming file and row."""
    seen: set[bytes] = set()
    for path in expand(files):
        name = layout
        for where, row in rows(path):
            try:
                name = name or layout_of(row)
                if missing := [column for column in LAYOUTS[name].columns if column not in row]:
                    raise ValueError(f"no column {missing[0]} of {name}; it has {', '.join(map(str, row))}")
                record = made(name, row)
            except NotUsable as reason:
                counts[str(reason)] += 1
                continue
            except ValueError as error:
                raise CorpusError(f"{where}: {error}") from error
            digest = hashlib.blake2b(record["prompt"].encode(), digest_size=12).digest()
            if digest in seen:
                counts["the same prompt is there already"] += 1
                continue
            seen.add(digest)
            yield record | {"metadata": {"source": name, "row": where}}


def made(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a row. Raises NotUsable for values of another kind and where its reward would not take it."""
    try:
        record = LAYOUTS[name].make(row)
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise NotUsable(f"a value of another kind than {name} has there ({type(error).__name__})") from error
    try:
        parse_object(json.dumps(record))  # what is within its columns' JSON can be written, too
        check_record(record)
    except ValueError as error:
        raise NotUsable(f"the reward {record['reward']} does not take it: {str(error).split(';')[0][:60]}") from error
    return record


if __name__ == "__main__":
    sys.exit(main())
