"""Turn JSONL (.gz, .zst) or parquet documents into token files: PREFIX.bin, PREFIX.idx, manifest PREFIX.json.

    python tools/tokenize_corpus.py corpus/*.jsonl --out data/corpus --tokenizer MODEL_DIR
    python tools/tokenize_corpus.py corpus/*.jsonl --out data --per-file --train-bpe 4096 --tokenizer data/tokenizer

A record is {"text": ...} or a chat {"messages": [{"role": "user", "content": ...}, ...]}.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from prism_mcore.console import plain, progress, say
from prism_mcore.data.corpus import expand
from prism_mcore.data.tokenizing import tokenize_files, train_bpe
from prism_mcore.text import load_tokenizer


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (ValueError, OSError) as error:
        say(f"tokenize_corpus: {error}", stderr=True)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    inputs = expand(options.inputs)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with progress(*columns) as shows:
        if options.train_bpe:
            bar = shows.add_task("training BPE", total=_size(inputs))
            size = train_bpe(
                inputs,
                options.train_bpe,
                options.tokenizer,
                text_key=options.text_key,
                single_digits=not options.whole_numbers,
                on_bytes=_updates(shows, bar),
            )
            shows.console.print(plain(f"{options.tokenizer}: {size} tokens (asked for {options.train_bpe})"))
        tokenizer = load_tokenizer(options.tokenizer)
        for prefix, domain, paths in _jobs(options, inputs):
            bar = shows.add_task(plain(os.path.basename(prefix)), total=_size(paths))
            manifest = tokenize_files(
                paths,
                prefix,
                tokenizer,
                domain=domain,
                text_key=options.text_key,
                mask_prompts=options.mask_prompts,
                seed=options.seed,
                workers=options.workers,
                on_bytes=_updates(shows, bar),
            )
            done = f"{prefix}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens"
            empty = f"{manifest['skipped_empty_documents']:,} empty documents left out"
            shows.console.print(plain(f"{done}, {empty}"), soft_wrap=True)


def _jobs(options: argparse.Namespace, inputs: list[str]) -> list[tuple[str, str, list[str]]]:
    """(prefix, domain, input files) of each token file to write."""
    if not options.per_file:
        return [(options.out, options.domain, inputs)]
    jobs: dict[str, str] = {}
    for path in inputs:
        stem = Path(path).name.split(".")[0]
        if stem in jobs:
            raise ValueError(f"{jobs[stem]} and {path} would both be written to {options.out}/{stem}; rename one")
        jobs[stem] = path
    return [(os.path.join(options.out, stem), stem, [path]) for stem, path in jobs.items()]


def _updates(progress: Progress, bar: TaskID) -> Callable[[int], None]:
    return lambda done: progress.update(bar, completed=done)


def _size(paths: list[str]) -> int:
    return sum(map(os.path.getsize, paths))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", help="files or glob patterns")
    parser.add_argument("--out", required=True, help="prefix of the token file; with --per-file a folder")
    parser.add_argument("--tokenizer", required=True, help="HF tokenizer directory (written first with --train-bpe)")
    parser.add_argument(
        "--train-bpe", type=int, metavar="VOCAB", help="train a byte-level BPE of this size on the inputs"
    )
    parser.add_argument(
        "--whole-numbers", action="store_true", help="let the trained BPE merge digits (default: one token each)"
    )
    parser.add_argument(
        "--per-file", action="store_true", help="one token file per input, its name also being its domain"
    )
    parser.add_argument("--domain", default="all", help="domain noted in the manifest (default: all)")
    parser.add_argument("--text-key", default="text", help="key or column that holds a document's text (default: text)")
    parser.add_argument(
        "--mask-prompts", action="store_true", help="write PREFIX.mask: only the assistant's words are learnt"
    )
    parser.add_argument("--seed", type=int, default=0, help="order of the documents (default: 0)")
    parser.add_argument("--workers", type=int, help="processes (default: all cores, fewer for small inputs)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
