"""Turn JSONL (.gz, .zst) or parquet documents into token files: PREFIX.bin, PREFIX.idx, manifest PREFIX.json.

    python tools/tokenize_corpus.py corpus/*.jsonl --out data/corpus --tokenizer MODEL_DIR
    python tools/tokenize_corpus.py corpus/*.jsonl --out data --per-file --train-bpe 4096 --tokenizer data/tokenizer

A record is {"text": ...} or a chat {"messages": [{"role": "user", "content": ...}, ...]}. A token file is there whole
or not at all; one that was made before of the same inputs in the same way is left as it is: the same command resumes.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from prism_mcore.console import plain, progress, say
from prism_mcore.data.corpus import expand
from prism_mcore.data.token_file import prefix_of
from prism_mcore.data.tokenizing import tokenize_files, train_bpe
from prism_mcore.text import load_tokenizer


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except KeyboardInterrupt:
        say("tokenize_corpus: interrupted; what was finished stays, the same command resumes", stderr=True)
        return 130
    except (ValueError, OSError) as error:
        say(f"tokenize_corpus: {error}", stderr=True)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    inputs = expand(options.inputs)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with progress(*columns) as shows:
        if options.train_bpe:
            if (Path(options.tokenizer) / "config.json").exists():
                raise ValueError(
                    f"--train-bpe would overwrite the tokenizer of the model in {options.tokenizer}; give --tokenizer"
                    " another folder, or leave --train-bpe out"
                )
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
            before = _written(prefix)
            manifest = tokenize_files(
                paths,
                prefix,
                tokenizer,
                domain=domain,
                text_key=options.text_key,
                mask_prompts=options.mask_prompts,
                seed=options.seed,
                workers=options.workers,
                resume=True,
                on_bytes=_updates(shows, bar),
            )
            done = f"{prefix}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens"
            empty, blank = manifest["skipped_empty_documents"], manifest["skipped_blank_lines"]
            note = "; was there" if before == _written(prefix) else "; replaces what was there" if before else ""
            shows.console.print(
                plain(f"{done}, {empty:,} empty documents and {blank:,} blank lines left out{note}"), soft_wrap=True
            )


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


def _written(prefix: str) -> tuple[int, int] | None:
    """Which .idx is there: (inode, time of writing); None where there is none."""
    idx = Path(f"{prefix_of(prefix)}.idx")
    return (idx.stat().st_ino, idx.stat().st_mtime_ns) if idx.exists() else None


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt  # half-written files are removed, as after Ctrl-C


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
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
