"""Tokenizing a corpus against its peer, `datasets.map` with the same tokenizer, on the same JSONL file.

    python benchmarks/tokenizing.py [--text FILE.jsonl --tokenizer DIR] [--megabytes 30] [--rounds 5] [--cores 2]

Without --text and --tokenizer: text of the installed Python packages, and a BPE of 128,000 tokens trained on it, kept
in --folder. Ours: `tokenize_files`, from JSONL to a shuffled token file. Peer (pip install datasets):
`load_dataset("json")` and `map(batched=True, num_proc=CORES)` with transformers' fast tokenizer, from JSONL to Arrow,
its cache empty. Each run in a fresh process, imports excluded, starting the worker processes included; sides alternate,
the best round of each counts. Writes benchmarks/results/tokenizing.json.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "tokenizing.json"
VOCABULARY, END = 128_000, "<|end of the benchmark's text|>"
SPLIT = (  # as the tokenizers of Llama 3 and Granite split words
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="JSONL with a text in each line")
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face tokenizer directory")
    parser.add_argument("--megabytes", type=int, default=30, help="of text, where it is made here")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "prism_benchmark_tokenizing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # one timed run, in its own process
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    text = options.text or options.folder / f"text_{options.megabytes}.jsonl"
    tokenizer = options.tokenizer or options.folder / "tokenizer"
    if options.side:
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            print(json.dumps(SIDES[options.side](text, tokenizer, Path(scratch), options.cores)))
        return
    if not text.exists() or not tokenizer.exists():
        make_inputs(text, tokenizer, options.megabytes)
    sides = list(SIDES)
    if importlib.util.find_spec("datasets") is None:
        print("datasets is not installed (pip install datasets): ours alone is measured", file=sys.stderr)
        sides.remove("datasets.map")
    best: dict[str, dict[str, float]] = {}
    for _ in range(options.rounds):
        for side in sides:
            command = [sys.executable, __file__, "--side", side, "--text", str(text), "--tokenizer", str(tokenizer)]
            command += ["--folder", str(options.folder), "--cores", str(options.cores)]
            result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])
            print(side, result, file=sys.stderr)
            best[side] = {key: min(best.get(side, result)[key], value) for key, value in result.items()}
    if len({one["tokens"] for one in best.values()}) > 1:
        raise SystemExit(f"the sides disagree on the tokens: {best}")
    report = {
        "megabytes": text.stat().st_size / 1e6,
        "cores": options.cores,
        "versions": {name: version(name) for name in ("tokenizers", "transformers", "datasets", "pyarrow")},
        "best": best,
    }
    if len(best) == 2:
        for key in ("seconds", "cpu_seconds"):
            report[f"peer_over_ours_{key}"] = best["datasets.map"][key] / best["ours"][key]
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def make_inputs(text: Path, folder: Path, megabytes: int) -> None:
    """Pieces of some 4,000 characters of installed packages' source and documentation, and a BPE trained on them."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    draw = random.Random(0)
    root = Path(importlib.util.find_spec("tokenizers").origin).parents[1]  # type: ignore[union-attr, arg-type]
    files = [path for path in sorted(root.rglob("*")) if path.suffix in (".py", ".pyi", ".md", ".rst", ".txt")]
    draw.shuffle(files)
    pieces: list[str] = []
    left = megabytes * 1_000_000
    for path in files:
        whole = path.read_text(encoding="utf-8", errors="replace") if path.stat().st_size < 200_000 else ""
        pieces += [whole[i : i + 4000] for i in range(0, len(whole), 4000)]
        left -= len(whole)
        if left < 0:
            break
    draw.shuffle(pieces)
    text.write_text("".join(json.dumps({"text": piece}, ensure_ascii=False) + "\n" for piece in pieces))
    if folder.exists():
        return
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(pieces, trainer)
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def now() -> tuple[float, float]:
    """Time of the wall, and of the CPU in this process and those that it has waited for."""
    return time.perf_counter(), sum(os.times()[:4])


def since(start: tuple[float, float]) -> dict[str, float]:
    wall, cpu = now()
    return {"seconds": wall - start[0], "cpu_seconds": cpu - start[1]}


def ours(text: Path, folder: Path, scratch: Path, cores: int) -> dict[str, float]:
    from prism_mcore.data.tokenizing import tokenize_files
    from prism_mcore.text import load_tokenizer

    start = now()
    manifest = tokenize_files([text], scratch / "c", load_tokenizer(folder), workers=cores)
    return since(start) | {"tokens": manifest["tokens"] - manifest["documents"]}


def peer(text: Path, folder: Path, scratch: Path, cores: int) -> dict[str, float]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    start = now()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)
        return {"input_ids": found["input_ids"]}

    corpus = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(scratch))
    encoded = corpus.map(encode, batched=True, num_proc=cores, remove_columns=corpus.column_names)
    taken = since(start)
    tokens = sum(len(chunk.values) for chunk in encoded.data.column("input_ids").chunks)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    return taken | {"tokens": tokens}


SIDES = {"ours": ours, "datasets.map": peer}


if __name__ == "__main__":
    main()
