"""Which questions of a benchmark are in the training data? N-grams of their tokens, looked for in token files.

A token file of the model's tokenizer holds a question that was copied into a document as the same tokens, but for the
first and last few. All n-grams of all questions are looked for at once, in one pass over the files.
"""

# t tokens of a block, n length of an n-gram, m n-grams of all questions

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prism_mcore.data.token_file import TokenFile
from prism_mcore.text import Tokenizer

BLOCK = 1 << 18  # tokens read at a time, which a cache holds
BITS = 24  # of the table that most positions fail at
_MIX = np.uint64(0x9E3779B97F4A7C15)


def overlaps(
    questions: Mapping[str, Sequence[int]],
    files: Sequence[str | Path],
    n: int,
    on_tokens: Callable[[int], object] = lambda more: None,
) -> dict[str, float | None]:
    """Of each question, by name, the share of its n-grams that the files hold; None where it is shorter than one.

    on_tokens: told how many more were read. Raises TokenFileError, naming the file, for one that cannot be read.
    """
    wanted = {name: _windows(np.array(tokens, np.int64), n) for name, tokens in questions.items()}
    every = np.concatenate([np.empty((0, n), np.int64), *wanted.values()])
    grams = np.unique(every, axis=0)
    hashes = _hashes(_mixed(grams))
    order = np.argsort(hashes)
    grams, hashes = grams[order], hashes[order]
    table = np.zeros(1 << BITS, bool)
    table[hashes >> np.uint64(64 - BITS)] = True
    found = np.zeros(len(grams), bool)
    for path in files if len(grams) else []:
        _search(path, n, grams, hashes, table, found, on_tokens)
    held = {gram.tobytes() for gram in grams[found]}
    return {
        name: sum(gram.tobytes() in held for gram in rows) / len(rows) if len(rows) else None
        for name, rows in wanted.items()
    }


def _search(
    path: str | Path,
    n: int,
    grams: np.ndarray,
    hashes: np.ndarray,
    table: np.ndarray,
    found: np.ndarray,
    on_tokens: Callable[[int], object],
) -> None:
    """Mark in `found` [m] which of the sorted n-grams one file holds."""
    file = TokenFile(path)
    try:
        for start in range(0, file.num_tokens, BLOCK):
            block = np.empty(min(BLOCK + n - 1, file.num_tokens - start), file.dtype)
            file.read(start, block)
            rolled = _hashes(_windows(_mixed(block), n))
            candidates = np.flatnonzero(table[rolled >> np.uint64(64 - BITS)])
            places = np.searchsorted(hashes, rolled[candidates])
            equal = (places < len(hashes)) & (hashes[np.minimum(places, len(hashes) - 1)] == rolled[candidates])
            for candidate, place in zip(candidates[equal], places[equal], strict=True):
                found[place] |= np.array_equal(block[candidate : candidate + n], grams[place])
            on_tokens(min(BLOCK, file.num_tokens - start))
    finally:
        file.close()


def _windows(tokens: np.ndarray, n: int) -> np.ndarray:
    """All n-grams [.., n], a view."""
    if len(tokens) < n:
        return np.empty((0, n), tokens.dtype)
    return np.lib.stride_tricks.sliding_window_view(tokens, n)


def _hashes(grams: np.ndarray) -> np.ndarray:
    """uint64 of each n-gram [.., n]: a polynomial in mixed tokens, modulo 2^64."""
    out = np.zeros(len(grams), np.uint64)
    for place in range(grams.shape[1]):
        out *= _MIX
        out += grams[:, place]
    return out ^ (out >> np.uint64(29))


def _mixed(tokens: np.ndarray) -> np.ndarray:
    """splitmix64 of the ids: neighbours must not have neighbouring values."""
    x = (tokens.astype(np.uint64) + np.uint64(1)) * _MIX
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def check_files(files: Sequence[str], tokenizer: Tokenizer) -> int:
    """Tokens in all of them. Raises ValueError for one that another tokenizer made, or that is none."""
    total = 0
    for path in files:
        file = TokenFile(path)
        made_by = (file.manifest or {}).get("tokenizer_sha256")
        total += file.num_tokens
        file.close()
        if made_by and made_by != tokenizer.sha256:
            raise ValueError(
                f"contamination.tokens: {path} was tokenized with another tokenizer than {tokenizer.source}; give files"
                " of the model's own, in which a question has the same tokens"
            )
    return total


def report(overlap: Mapping[str, float | None], n: int, share: float) -> dict[str, Any]:
    """What results.json says: the overlap of each question, and those that count as hits."""
    hits = sorted(name for name, found in overlap.items() if found is not None and found >= share)
    short = sorted(name for name, found in overlap.items() if found is None)
    return {"ngram": n, "hit_at": share, "hits": hits, "too_short": short, "overlap": dict(overlap)}
