"""Prompts that are neither too easy nor too hard for a model: `python tools/filter_prompts.py PROMPTS.jsonl --hf DIR
--out KEPT.jsonl [--samples 16] [--keep 1-15] [--top-up N] [section.name=value ...]`.

Every prompt is answered --samples times by the model in DIR (launch/generate.py, with sampling.temperature=1 unless a
setting says otherwise; --ranks processes of torchrun), the answers are graded by the prompts' own rewards, and those
prompts are kept of which the number of right answers lies in --keep. PRISM keeps math with exactly 1 of 16 right
(--keep 1) and code and science with at least one (--keep 1-16); its balanced mixtures are topped up with prompts that
nothing solved (--top-up 19000), drawn by --seed.

KEPT.jsonl has the prompts as they were, with `passes`; KEPT.jsonl.graded every prompt's count, KEPT.png the histogram.
The same command goes on from the samples that are there.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from prism_mcore.checkpoint.durable import write_atomically
from prism_mcore.console import progress_bar, say, show
from prism_mcore.json_lines import JsonLines
from prism_mcore.rewards import check_record
from prism_mcore.rewards.verifier import Verifier
from prism_mcore.rl.prompts import render

GENERATE = Path(__file__).parents[1] / "launch" / "generate.py"


def main(arguments: list[str] | None = None) -> int:
    options, settings = _parser().parse_known_args(arguments)
    try:
        low, high = bounds(options.keep, options.samples)
        if unknown := [text for text in settings if "=" not in text or text.startswith("-")]:
            raise ValueError(f"unknown argument {unknown[0]}; settings are section.name=value")
        if options.out.is_dir() or not options.out.resolve().parent.is_dir():
            raise ValueError(f"--out {options.out}: needed: a file in a folder that is there")
        records = read(options.prompts)
        if options.dry_run:
            answers = f"{len(records):,} prompts x {options.samples} = {len(records) * options.samples:,} answers"
            say(f"{answers}; kept are prompts with {low} to {high} right")
            return 0
        responses = answered(records, options, settings)
        passes = graded(records, responses, options)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        say(f"filter_prompts: {error}", stderr=True)
        return error.returncode if isinstance(error, subprocess.CalledProcessError) else 2
    kept = chosen(passes, low, high, options.top_up, options.seed)
    lines = (json.dumps(records[i] | {"passes": passes[i]}, ensure_ascii=False) + "\n" for i in kept)
    write_atomically(options.out, "".join(lines))
    histogram(passes, options.samples, (low, high), options.out.with_suffix(".png"))
    say(f"{options.out}: {len(kept):,} of {len(records):,} prompts, with {low} to {high} of {options.samples} right")
    if options.top_up and len(kept) < options.top_up:
        say(f"note: {options.top_up:,} were asked for; no more prompts were answered wrongly by all samples")
    return 0


def bounds(keep: str, samples: int) -> tuple[int, int]:
    """`3` or `1-15` as (fewest, most). Raises ValueError where that is no part of 0 to samples."""
    low, dash, high = keep.partition("-")
    if not (low.isdigit() and (high.isdigit() or not dash)):
        raise ValueError(f"--keep {keep}: needed: a number of right answers, or FEWEST-MOST")
    found = int(low), int(high if dash else low)
    if not found[0] <= found[1] <= samples:
        raise ValueError(f"--keep {keep}: needed: numbers from 0 to --samples, which is {samples}")
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """The prompts. Raises ValueError with file and line for one that its reward cannot grade."""
    records = []
    for number, _, record in JsonLines(path):
        try:
            check_record(record)
            render(record)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        records.append(record)
    if not records:
        raise ValueError(f"{path} has no prompts")
    return records


def answered(records: list[dict[str, Any]], options: argparse.Namespace, settings: list[str]) -> list[str]:
    """options.samples responses to each prompt, one prompt's after the other's."""
    asked = Path(f"{options.out}.asked.jsonl")
    text = "".join(json.dumps({"prompt": render(record)}, ensure_ascii=False) + "\n" for record in records)
    if not asked.is_file() or asked.read_text(encoding="utf-8") != text:
        write_atomically(asked, text)
    # Samples are those of a model, prompts and settings: others have another file.
    case = json.dumps([text, str(options.hf), options.samples, settings])
    out = Path(f"{options.out}.{hashlib.sha256(case.encode()).hexdigest()[:12]}.responses.jsonl")
    if not out.is_file():
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(options.ranks),
            str(GENERATE),
        ]
        files = ["--hf", str(options.hf), "--prompts", str(asked), "--out", str(out)]
        given = ["sampling.temperature=1.0", *settings, f"sampling.samples={options.samples}"]
        subprocess.run([*launcher, *files, *given], check=True)
    responses = [record["response"] for _, _, record in JsonLines(out)]
    if len(responses) != len(records) * options.samples:
        raise ValueError(f"{out} has {len(responses)} responses; needed: {len(records)} x {options.samples}; remove it")
    return responses


def graded(records: list[dict[str, Any]], responses: list[str], options: argparse.Namespace) -> list[int]:
    """How many responses to each prompt are right; those whose grading failed count as wrong, and are counted."""
    passes, failed = [0] * len(records), 0
    rewards = {record["reward"] for record in records}
    with (
        Verifier(options.workers, options.timeout_s, rewards) as verifier,
        progress_bar("grading", len(responses)) as advance,
    ):
        for ticket, response in enumerate(responses):
            verifier.submit(ticket, records[ticket // options.samples], response)
        while verifier.outstanding:
            for verdict in verifier.results() or verifier.results(block=True):
                passes[verdict.ticket // options.samples] += verdict.parts.get("correct", 0.0) == 1.0
                failed += verdict.status != "ok"
                advance(1)
    if failed:
        say(f"note: {failed:,} responses could not be graded in time; they count as wrong", stderr=True)
    lines = (json.dumps({"line": i, "passes": n, "samples": options.samples}) + "\n" for i, n in enumerate(passes))
    write_atomically(Path(f"{options.out}.graded"), "".join(lines))
    return passes


def chosen(passes: list[int], low: int, high: int, top_up: int, seed: int) -> list[int]:
    """Places of the prompts to keep, in their order: those within, and of those that nothing solved as many as lack."""
    kept = [i for i, count in enumerate(passes) if low <= count <= high]
    unsolved = [i for i, count in enumerate(passes) if count == 0 and low > 0]
    lacking = min(max(0, top_up - len(kept)), len(unsolved))
    return sorted([*kept, *random.Random(seed).sample(unsolved, lacking)])


def histogram(passes: list[int], samples: int, keep: tuple[int, int], path: Path) -> None:
    """The counts as a table and as a picture."""
    import matplotlib
    from rich.table import Table

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = Counter(passes)
    table = Table("right", "prompts", "")
    for count in range(samples + 1):
        bar = "#" * round(40 * counts[count] / max(counts.values()))
        table.add_row(
            f"{count}/{samples}", f"{counts[count]:,}", bar + (" kept" if keep[0] <= count <= keep[1] else "")
        )
    show(table)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    places = list(range(samples + 1))
    colours = ["C0" if keep[0] <= count <= keep[1] else "lightgrey" for count in places]
    axes.bar(places, [counts[count] for count in places], color=colours)
    axes.set(xlabel=f"right answers of {samples}", ylabel="prompts", title="kept: blue")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, metavar="PROMPTS.jsonl", help="as RL reads them")
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="the model, a Hugging Face directory")
    parser.add_argument("--out", type=Path, required=True, metavar="KEPT.jsonl", help="the prompts that are kept")
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="answers to each prompt (default 16)")
    parser.add_argument("--keep", default="1-15", metavar="N[-M]", help="right answers of a kept prompt (default 1-15)")
    parser.add_argument(
        "--top-up", type=int, default=0, metavar="N", help="at least so many, with prompts nothing solved"
    )
    parser.add_argument("--seed", type=int, default=0, help="of those")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes that generate (torchrun)")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="processes that grade")
    parser.add_argument("--timeout-s", type=float, default=10.0, help="seconds that one response may take to grade")
    parser.add_argument("--dry-run", action="store_true", help="read and count, and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
