"""Write a small corpus of real text from what is on this machine, and prompts for RL; nothing is downloaded.

    python tools/make_demo_corpus.py --out DIR

general.jsonl  the Python language reference, and docstrings of one half of the standard library
code.jsonl     source files of the other half
math.jsonl     reasoning-gym problems as chats: most with worked answers in <think>, the others with the bare answer
science.jsonl  questions on elements, isotopes and compounds (periodictable) as chats with worked answers
sums.jsonl     sums and differences of two digits (reasoning-gym), some worked in <think>, most with the bare answer
sums-bare.jsonl    the same problems in the same order, all bare
sums-prompts.jsonl, sums-held-out.jsonl    for RL: four fifths of these problems, and the others

Needs the `demo` extra. The same seed, size and versions of Python and packages give the same files.
"""

import argparse
import ast
import json
import math
import os
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from prism_mcore.console import progress, say, show

Record = dict[str, Any]

_BARE_SHARE = 0.3  # of the math problems: answered without working
_WORKED_SUMS = 0.3  # of the sums: answered with their working
_HELD_OUT_SUMS = 0.2  # of the different sums: not among RL's prompts


# --- general and code -------------------------------------------------------------------------------------------------


def general(rng: random.Random) -> Iterator[Record]:
    """The language reference topic by topic, then per module all its docstrings, signatures above them."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    rng.shuffle(names)
    for name in names:
        yield {"text": topics[name].strip()}
    for path in _library_files(rng, half=0):
        text = _docstrings(path)
        if len(text) > 200:
            yield {"text": text}


def code(rng: random.Random) -> Iterator[Record]:
    for path in _library_files(rng, half=1):
        text = _source(path)
        if len(text) > 200:
            yield {"text": text}


def _library_files(rng: random.Random, half: int) -> list[Path]:
    """Every other module of the standard library, shuffled: code and its docstrings never come from the same file."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idlelib", "pydoc_data", "encodings", "__pycache__"}
    files = sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    chosen = files[half::2]
    rng.shuffle(chosen)
    return chosen


def _source(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(_source(path))
    except SyntaxError:  # lib2to3's test data
        return ""
    parts = [ast.get_docstring(tree) or ""]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            text = ast.get_docstring(node)
            if text and not isinstance(node, ast.ClassDef):
                parts.append(f"{node.name}({ast.unparse(node.args)})\n{text}")
            elif text:
                parts.append(f"class {node.name}\n{text}")
    return "\n\n".join(part for part in parts if part)


# --- math -------------------------------------------------------------------------------------------------------------


def math_problems(rng: random.Random) -> Iterator[Record]:
    """Problems of several reasoning-gym tasks in turn, without end; see WORKED for those that come with their
    working.
    """
    import reasoning_gym

    tasks = [*WORKED, "basic_arithmetic", "calendar_arithmetic"]
    for _ in range(1 << 30):
        seed = rng.randrange(1 << 30)
        columns = [list(reasoning_gym.create_dataset(task, size=256, seed=seed)) for task in tasks]
        for row in zip(*columns, strict=True):
            for task, problem in zip(tasks, row, strict=True):
                steps = WORKED[task](problem["metadata"]) if task in WORKED and rng.random() >= _BARE_SHARE else None
                yield _chat(problem["question"].strip(), problem["answer"], steps)


def _chain_sum(metadata: dict[str, Any]) -> list[str]:
    """57 + 87 + 70 -> the running total, term by term; decimals exactly."""
    first, *rest = metadata["expression"].split()
    total, steps = Decimal(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + Decimal(term) if sign == "+" else total - Decimal(term)
        steps.append(f"{_plain(total)} {sign} {term} = {_plain(after)}")
        total = after
    return steps


def _gcd(metadata: dict[str, Any]) -> list[str]:
    numbers = metadata["numbers"]
    steps, result = [], numbers[0]
    for number in numbers[1:]:
        found, result = _euclid(result, number)
        steps += found
    return [*steps, f"gcd({', '.join(map(str, numbers))}) = {result}"]


def _lcm(metadata: dict[str, Any]) -> list[str]:
    steps, result = [], metadata["numbers"][0]
    for number in metadata["numbers"][1:]:
        found, common = _euclid(result, number)
        merged = result * number // common
        steps += [*found, f"lcm({result}, {number}) = {result} * {number} / {common} = {merged}"]
        result = merged
    return steps


def _euclid(a: int, b: int) -> tuple[list[str], int]:
    """Euclid's divisions and the greatest common divisor."""
    a, b = max(a, b), min(a, b)
    steps = []
    while b:
        steps.append(f"{a} = {a // b} * {b} + {a % b}")
        a, b = b, a % b
    return steps, a


def _product(metadata: dict[str, Any]) -> list[str]:
    """Long multiplication: one partial product per digit of the second factor, then their sum."""
    a, b = (int(factor) for factor in metadata["expression"].split(" * "))
    parts = [(int(digit) * 10**place) for place, digit in enumerate(reversed(str(abs(b)))) if digit != "0"]
    steps = [f"{a} * {part} = {a * part}" for part in parts]
    total = a * parts[0] if parts else 0
    for part in parts[1:]:
        steps.append(f"{total} + {a * part} = {total + a * part}")
        total += a * part
    return steps or [f"{a} * 0 = 0"]


def _factors(metadata: dict[str, Any]) -> list[str]:
    number, steps = metadata["number"], []
    for factor in metadata["factors"][:-1]:
        steps.append(f"{number} = {factor} * {number // factor}")
        number //= factor
    return [*steps, f"{number} is prime"]


def _legs(metadata: dict[str, Any]) -> list[str]:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    total, steps = 0, []
    for animal, count in metadata["animals"].items():
        legs = count * ANIMALS[animal]
        steps.append(f"{animal}: {count} * {ANIMALS[animal]} = {legs}, {total} + {legs} = {total + legs}")
        total += legs
    return steps


def _fraction(metadata: dict[str, Any]) -> list[str]:
    top, bottom = metadata["numerator"], metadata["denominator"]
    steps, common = _euclid(top, bottom)
    return [*steps, f"{top} / {common} = {top // common}", f"{bottom} / {common} = {bottom // common}"]


WORKED: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "chain_sum": _chain_sum,
    "decimal_chain_sum": _chain_sum,
    "gcd": _gcd,
    "lcm": _lcm,
    "products": _product,
    "prime_factorization": _factors,
    "leg_counting": _legs,
    "fraction_simplification": _fraction,
}


# --- science ----------------------------------------------------------------------------------------------------------

_COMPOUNDS = """
    H2O H2O2 CO2 CO CH4 C2H6 C3H8 C6H6 C2H5OH CH3OH C6H12O6 C12H22O11 NH3 HNO3 NaOH KOH NaCl KCl CaCO3 CaCl2 CaO MgO
    MgSO4 Na2CO3 NaHCO3 H2SO4 H3PO4 HCl HF HBr SO2 SO3 NO2 N2O P4O10 SiO2 Al2O3 Fe2O3 Fe3O4 FeS2 CuSO4 CuO ZnO ZnS TiO2
    PbO2 PbS AgNO3 AgCl BaSO4 KMnO4 K2Cr2O7 LiOH Li2CO3 NH4NO3 NH4Cl CaSO4 CaF2 NaF KNO3 NaNO3 SnO2 MnO2 WC SiC
""".split()  # noqa: SIM905 - sixty quoted strings are harder to read


def science(rng: random.Random) -> Iterator[Record]:
    """Questions drawn at random, without end."""
    import periodictable

    elements = [element for element in periodictable.elements if element.number > 0]
    kinds = [_ask_symbol, _ask_number, _ask_neutrons, _ask_heavier, _ask_molar_mass, _ask_grams, _ask_share]
    asked = set()
    for _ in range(1 << 30):
        record = rng.choice(kinds)(rng, elements)
        question = record["messages"][0]["content"]
        if question not in asked:
            asked.add(question)
            yield record


def _ask_symbol(rng: random.Random, elements: list[Any]) -> Record:
    element = rng.choice(elements)
    question = rng.choice(["What is the chemical symbol of {}?", "Which symbol stands for the element {}?"])
    return _chat(question.format(element.name), element.symbol, [f"{element.name} is element {element.number}."])


def _ask_number(rng: random.Random, elements: list[Any]) -> Record:
    element = rng.choice(elements)
    ask = rng.choice(["How many protons does an atom of {} have?", "What is the atomic number of {}?"])
    steps = [f"The symbol of {element.name} is {element.symbol}.", "The atomic number counts the protons."]
    return _chat(ask.format(element.name), str(element.number), steps)


def _ask_neutrons(rng: random.Random, elements: list[Any]) -> Record:
    element = rng.choice(elements)
    nucleons = rng.choice(element.isotopes)
    steps = [
        f"{element.name} has {element.number} protons.",
        f"The mass number counts protons and neutrons: {nucleons} - {element.number} = {nucleons - element.number}",
    ]
    question = f"How many neutrons are in a nucleus of {element.name}-{nucleons}?"
    return _chat(question, str(nucleons - element.number), steps)


def _ask_heavier(rng: random.Random, elements: list[Any]) -> Record:
    one, other = rng.sample([element for element in elements if element.density], 2)
    denser = max(one, other, key=lambda element: element.density)
    steps = [f"The density of {element.name} is {element.density} g/cm3." for element in (one, other)]
    if one.density == other.density:
        return _chat(f"Compare the densities of {one.name} and {other.name}.", "They are equal.", steps)
    return _chat(f"Which is denser, {one.name} or {other.name}?", denser.name, steps)


def _ask_molar_mass(rng: random.Random, elements: list[Any]) -> Record:
    formula = rng.choice(_COMPOUNDS)
    steps, total = _molar_mass(formula)
    ask = rng.choice(["What is the molar mass of {} in g/mol?", "Work out the molar mass of {} (g/mol)."])
    return _chat(ask.format(formula), str(total), steps)


def _ask_grams(rng: random.Random, elements: list[Any]) -> Record:
    formula = rng.choice(_COMPOUNDS)
    moles = Decimal(rng.randrange(1, 100)) / 10
    steps, molar = _molar_mass(formula)
    grams = moles * molar
    steps.append(f"{moles} * {molar} = {grams}")
    return _chat(f"What is the mass of {moles} mol of {formula} in grams?", f"{grams} g", steps)


def _ask_share(rng: random.Random, elements: list[Any]) -> Record:
    formula = rng.choice(_COMPOUNDS)
    steps, total = _molar_mass(formula)
    symbol, count, mass = rng.choice(_atoms(formula))
    percent = round(100 * count * mass / total, 1)
    steps.append(f"100 * {count * mass} / {total} ≈ {percent}")
    return _chat(f"How many percent of the mass of {formula} is {symbol}?", f"{percent}%", steps)


def _molar_mass(formula: str) -> tuple[list[str], Decimal]:
    steps, total = [], Decimal(0)
    for symbol, count, mass in _atoms(formula):
        part = count * mass
        steps.append(f"{symbol}: {count} * {mass} = {part}")
        if total:
            steps.append(f"{total} + {part} = {total + part}")
        total += part
    return steps, total


def _atoms(formula: str) -> list[tuple[str, int, Decimal]]:
    """(symbol, count, mass in g/mol to three decimals) of each element of a formula."""
    import periodictable

    atoms = periodictable.formula(formula).atoms
    return [(atom.symbol, int(count), Decimal(f"{atom.mass:.3f}")) for atom, count in atoms.items()]


# --- sums -------------------------------------------------------------------------------------------------------------


def sums(rng: random.Random) -> Iterator[Record]:
    """Two-digit problems without end, three in ten worked: enough that RL can find the habit, and has it to find."""
    for problem in _sums(rng.randrange(1 << 30), 1 << 20):
        expression, worked = problem["metadata"]["expression"], rng.random() < _WORKED_SUMS
        steps = [f"{expression} = {problem['answer']}"] if worked else None
        yield _chat(problem["question"].strip(), problem["answer"], steps)


def bare_sums(rng: random.Random) -> Iterator[Record]:
    """The same problems in the same order, none of them worked."""
    for record in sums(rng):
        question, reply = (message["content"] for message in record["messages"])
        yield _chat(question, reply.rsplit("\n", 1)[-1], None)


def _sums(seed: int, size: int) -> Iterator[Record]:
    import reasoning_gym

    digits = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    yield from reasoning_gym.create_dataset("chain_sum", size=size, seed=seed, **digits)


def sum_prompts(held_out: bool) -> Callable[[random.Random], Iterator[Record]]:
    """Each different sum once, as a prompt whose answer reasoning-gym's scorer checks: those held out, or the others.

    Every sum occurs in the mid-training documents; held out means that RL never sees it.
    """

    def prompts(rng: random.Random) -> Iterator[Record]:
        seen = set()
        for problem in _sums(0, 1 << 12):
            expression = problem["metadata"]["expression"]
            if expression in seen:
                continue
            seen.add(expression)
            if (random.Random(expression).random() < _HELD_OUT_SUMS) == held_out:
                metadata = {"source_dataset": "chain_sum", "expression": expression}
                question, answer = problem["question"].strip(), problem["answer"]
                yield {"prompt": question, "reward": "gym", "answer": answer, "metadata": metadata}

    return prompts


# --- writing ----------------------------------------------------------------------------------------------------------


def _chat(question: str, answer: str, steps: list[str] | None) -> Record:
    thought = "" if steps is None else "<think>\n" + "\n".join(steps) + "\n</think>\n"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": thought + answer}]}


def _plain(number: Decimal) -> str:
    """Without a needless exponent or trailing zeros: 74.90 -> 74.9, 7E+1 -> 70."""
    text = f"{number:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


FILES: dict[str, Callable[[random.Random], Iterator[Record]]] = {
    "general": general,
    "code": code,
    "math": math_problems,
    "science": science,
    "sums": sums,
    "sums-bare": bare_sums,
    "sums-prompts": sum_prompts(held_out=False),
    "sums-held-out": sum_prompts(held_out=True),
}


def make_corpus(out: Path, size_mb: float, seed: int, progress: Progress | None = None) -> dict[str, tuple[int, int]]:
    """Write each of FILES as NAME.jsonl, at most `size_mb` MB each. Returns {name: (records, bytes)}."""
    limit = math.floor(size_mb * 1e6)
    out.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, records in FILES.items():
        bar = progress.add_task(name, total=limit) if progress else None
        documents = size = 0
        temporary = out / f"{name}.jsonl.tmp-{os.getpid()}"
        try:
            with open(temporary, "w", encoding="utf-8") as stream:
                for record in records(random.Random(f"{seed} {name.removesuffix('-bare')}")):
                    line = json.dumps(record, ensure_ascii=False) + "\n"
                    if size + len(line.encode()) > limit:
                        break
                    stream.write(line)
                    documents, size = documents + 1, size + len(line.encode())
                    if progress and bar is not None:
                        progress.update(bar, completed=size)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, out / f"{name}.jsonl")
        finally:
            temporary.unlink(missing_ok=True)
        written[name] = documents, size
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--size", type=float, default=2.0, help="most megabytes per file (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="which documents, in which order (default: 0)")
    options = parser.parse_args(arguments)
    try:
        with progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn()) as shows:
            written = make_corpus(options.out, options.size, options.seed, shows)
    except ModuleNotFoundError as error:
        say(f"make_demo_corpus: {error}; install the demo extra: pip install -e '.[demo]'", stderr=True)
        return 1
    table = Table("file", "documents", "bytes")
    for name, (documents, size) in written.items():
        table.add_row(name, f"{documents:,}", f"{size:,}")
    show(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
