"""Small token files for the data tests."""

from pathlib import Path

import numpy as np

from prism_mcore.data.token_file import TokenFileWriter


def write_tokens(prefix: Path, lengths: list[int], *, dtype=np.uint16, first: int = 0, mask: bool = False) -> str:
    """Documents of the given lengths holding the ids first, first + 1, ...: a token's id tells its place."""
    tokens = np.arange(first, first + sum(lengths))
    with TokenFileWriter(prefix, dtype, with_mask=mask) as writer:
        writer.add(tokens, np.array(lengths), (tokens % 3 > 0).astype(np.uint8) if mask else None)
    return str(prefix)


def random_lengths(seed: int, num_documents: int, mean: int) -> list[int]:
    return np.random.default_rng(seed).geometric(1 / mean, num_documents).tolist()
