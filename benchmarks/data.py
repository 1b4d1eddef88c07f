"""The data path against its peers on the same token file: opening a large corpus, and reading batches from page cache.

    python benchmarks/data.py [--documents 10000000 --tokens 1000000000] [--folder DIR]

Peers: megatron-core's GPTDataset, built by its BlendedMegatronDatasetBuilder with its C++ helpers (for opening: once
building its indices, once finding them in its cache) and read through torch's DataLoader; and the machine's memcpy of
the bytes that our batches consist of. Sides alternate, the best round of each counts. Opening is timed in fresh
processes, imports excluded. Writes benchmarks/results/data.json.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LEN, MICRO_BATCH, STEPS = 8192, 8, 25
RESULTS = Path(__file__).parent / "results" / "data.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--tokens", type=int, default=1_000_000_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "prism_benchmark_data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--open", choices=OPENERS, help=argparse.SUPPRESS)  # one timed opening, in its own process
    options = parser.parse_args()
    prefix = str(options.folder / f"corpus_{options.documents}_{options.tokens}")
    if options.open:
        print(json.dumps(OPENERS[options.open](prefix)))
        return
    if not os.path.exists(f"{prefix}.idx"):
        write_corpus(prefix, options.documents, options.tokens)
    results: dict[str, Any] = {"documents": options.documents, "tokens": options.tokens, "seq_len": SEQ_LEN}
    results["open"] = compare_opening(prefix, options)
    results["read_million_tokens_per_s"] = compare_reading(prefix, options.rounds)
    results["order_million_samples_per_s"] = measure_order(options.rounds)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def write_corpus(prefix: str, num_documents: int, num_tokens: int) -> None:
    """Documents of geometric lengths, random ids below 50,000, through our writer in parts."""
    from prism_mcore.data.token_file import TokenFileWriter

    rng = np.random.default_rng(0)
    start = time.perf_counter()
    with TokenFileWriter(prefix, np.uint16) as writer:
        for _ in range(100):
            lengths = rng.geometric(num_documents / num_tokens, num_documents // 100)
            writer.add(rng.integers(0, 50_000, lengths.sum(), dtype=np.uint16), lengths)
    print(f"wrote {prefix} in {time.perf_counter() - start:.0f} s", file=sys.stderr)


# --- opening ----------------------------------------------------------------------------------------------------------


def ours(prefix: str, packing: str = "concat", document_mask: bool = True) -> Any:
    from prism_mcore.data.loader import DataLoader
    from prism_mcore.data.settings import DataSettings

    settings = DataSettings.model_validate(
        {
            "sources": [{"path": prefix}],
            "seq_len": SEQ_LEN,
            "packing": packing,
            "document_mask": document_mask,
            "prefetch_steps": 0,
        }
    )
    return DataLoader(settings, vocab_size=50_000, seed=1, global_batch=MICRO_BATCH, micro_batch=MICRO_BATCH)


class _EndOfText:
    """All that megatron-core's builder asks of a tokenizer."""

    eod, pad, vocab_size = 0, 0, 50_000
    unique_identifiers = {"class": "benchmark"}  # noqa: RUF012


def build_megatron(prefix: str, cache: str) -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ_LEN,
        blend=([prefix], None),
        split="100,0,0",
        path_to_cache=cache,
        tokenizer=_EndOfText(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    num_samples = os.path.getsize(f"{prefix}.bin") // 2 // SEQ_LEN - 1
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, config).build()
    return train


def megatron_batches(dataset: Any, rng: np.random.Generator) -> Any:
    import torch

    order = rng.permutation(len(dataset))
    return iter(torch.utils.data.DataLoader(dataset, batch_size=MICRO_BATCH, sampler=order.tolist(), num_workers=0))


def timed_opening(open_and_read: Callable[[], object]) -> dict[str, float]:
    import psutil

    process = psutil.Process()
    before = process.memory_full_info().uss
    start = time.perf_counter()
    kept = open_and_read()
    seconds = time.perf_counter() - start
    more = process.memory_full_info().uss - before
    del kept
    return {"seconds": seconds, "private_mb": more / 1e6}


def open_ours(prefix: str, packing: str) -> dict[str, float]:
    import prism_mcore.data.loader  # noqa: F401

    def first_batch() -> object:
        loader = ours(prefix, packing)
        return loader, next(loader.steps())

    return timed_opening(first_batch)


def open_megatron(prefix: str, fresh: bool) -> dict[str, float]:

    cache = f"{prefix}_megatron_cache"
    if fresh:
        shutil.rmtree(cache, ignore_errors=True)

    def first_batch() -> object:
        dataset = build_megatron(prefix, cache)
        return dataset, next(megatron_batches(dataset, np.random.default_rng(0)))

    return timed_opening(first_batch)


OPENERS: dict[str, Callable[[str], dict[str, float]]] = {
    "ours concat": lambda prefix: open_ours(prefix, "concat"),
    "ours best_fit": lambda prefix: open_ours(prefix, "best_fit"),
    "megatron-core, building": lambda prefix: open_megatron(prefix, fresh=True),
    "megatron-core, from its cache": lambda prefix: open_megatron(prefix, fresh=False),
}


def compare_opening(prefix: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in OPENERS}
    command = [sys.executable, __file__, "--documents", str(options.documents), "--tokens", str(options.tokens)]
    for _ in range(options.rounds):
        for name, taken in rounds.items():
            child = [*command, "--folder", str(options.folder), "--open", name]
            result = subprocess.run(child, capture_output=True, text=True, check=True)
            taken.append(json.loads(result.stdout.splitlines()[-1]))
    return {name: {key: min(one[key] for one in taken) for key in taken[0]} for name, taken in rounds.items()}


# --- reading ----------------------------------------------------------------------------------------------------------


def compare_reading(prefix: str, num_rounds: int) -> dict[str, float]:
    """Million tokens per s of STEPS micro-batches of MICRO_BATCH x SEQ_LEN, batches being thrown away."""
    import torch

    torch.set_num_threads(1)
    keep_freed_memory()
    sides: dict[str, Callable[[], object]] = {}
    for packing in ("concat", "best_fit"):
        for document_mask in (False, True):
            steps = ours(prefix, packing, document_mask).steps()
            sides[f"ours {packing}, {'documents isolated' if document_mask else 'rows whole'}"] = steps.__next__
    batches = megatron_batches(build_megatron(prefix, f"{prefix}_megatron_cache"), np.random.default_rng(0))
    sides["megatron-core GPTDataset, torch DataLoader"] = batches.__next__
    batch = next(ours(prefix).steps())[0]
    tensors = [part for part in vars(batch).values() if isinstance(part, torch.Tensor)]
    sides["memcpy of the batch"] = lambda: [part.clone() for part in tensors]
    best = {name: float("inf") for name in sides}
    for _ in range(num_rounds):
        for name, read in sides.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                read()
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: STEPS * MICRO_BATCH * SEQ_LEN / seconds / 1e6 for name, seconds in best.items()}


def keep_freed_memory() -> None:
    """As a run without CUDA does at its start: malloc keeps big blocks. Else every side mostly measures page faults."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def measure_order(num_rounds: int) -> dict[str, float]:
    """Million samples per s through the permutation and the mixture, at the tenth million, in blocks and one at a
    time.
    """
    from prism_mcore.data.mixture import Mixture
    from prism_mcore.data.order import key_of, permute

    paper = Mixture([5, 5, 10, 7, 20, 3, 10, 13.75, 13.75, 7.75, 4.75])
    arbitrary = Mixture(np.random.default_rng(0).random(11).tolist())
    block = np.arange(10_000_000, 10_000_000 + (1 << 14))
    sides: dict[str, tuple[Callable[[], object], int]] = {
        "permutation, blocks of 16,384": (lambda: permute(block, 20_000_000, key_of(1, 2)), len(block)),
        "permutation, one at a time": (lambda: permute(block[:1], 20_000_000, key_of(1, 2)), 1),
        "mixture, the paper's eleven weights": (lambda: paper.locate(block), len(block)),
        "mixture, eleven random weights, nothing cached": (lambda: _cold_locate(arbitrary, block), len(block)),
    }
    best = {name: float("inf") for name in sides}
    for _ in range(num_rounds):
        for name, (run, _) in sides.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: count / best[name] / 1e6 for name, (_, count) in sides.items()}


def _cold_locate(mixture: Any, block: np.ndarray) -> object:
    mixture._schedule.cache_clear()
    mixture._border.cache_clear()
    return mixture.locate(block)


if __name__ == "__main__":
    main()
