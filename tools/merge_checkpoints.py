"""Average Hugging Face checkpoints: `python tools/merge_checkpoints.py BASE:0.15 MIDTRAINED:0.85 --out DIR`.

Any number of checkpoints of one architecture, each with a weight; weights are divided by their sum. Tensors are read a
block at a time, summed in fp32 and written in the dtypes, shards and order of the first checkpoint (or of --like), with
its config and tokenizer; memory stays small. Only safetensors.
"""

import argparse
import math
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

from prism_mcore.console import plain, progress, say, show
from prism_mcore.convert.read import HFDirectory, check_same_model, read_directory
from prism_mcore.convert.write import write_directory


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        merge(options.checkpoints, options.out, options.like)
    except (ValueError, OSError) as error:  # ExchangeError is a ValueError
        say(f"merge_checkpoints: {error}", stderr=True)
        return 1
    return 0


def merge(checkpoints: list[str], out: Path, like: Path | None) -> None:
    """Write the average of `PATH:WEIGHT`s to `out`, a new directory laid out as `like` or as the first checkpoint."""
    paths, shares = parse(checkpoints)
    sources = [read_directory(path) for path in paths]
    layout = read_directory(like) if like else sources[0]
    for source in sources:
        check_same_model(source, layout)
    show(_table(paths, shares, checkpoints))
    started = time.monotonic()
    size = sum(entry.end - entry.start for _, _, entry in layout.entries())
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Average(sources, shares) as average, progress(*columns) as shows:
        bar = shows.add_task("", total=size)
        write_directory(out, layout, average.fill, lambda done: shows.advance(bar, done))
    seconds = time.monotonic() - started
    say(f"{out}: {len(layout.names):,} tensors in {len(layout.shards)} files, {size / 1e9:.3g} GB in {seconds:.1f} s")


def parse(checkpoints: list[str]) -> tuple[list[Path], list[float]]:
    """The paths and the shares, which sum to 1, of `PATH:WEIGHT`s."""
    paths, weights = [], []
    for checkpoint in checkpoints:
        path, colon, text = checkpoint.rpartition(":")
        try:
            weight = float(text) if colon and path else math.nan
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise ValueError(f"{checkpoint!r}: needed: DIR:WEIGHT with a weight above 0, such as {path or 'base'}:0.15")
        paths.append(Path(path))
        weights.append(weight)
    return paths, [weight / math.fsum(weights) for weight in weights]


class Average(ExitStack):
    """Rows of the weighted sum of several checkpoints' tensors; files are opened when they are first wanted."""

    def __init__(self, sources: list[HFDirectory], shares: list[float]):
        super().__init__()
        self.shares = shares
        self.places = [{name: source.folder / file for file, name, _ in source.entries()} for source in sources]
        self.files: dict[Path, safe_open] = {}

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` with the rows of a tensor from `start` on, summed in fp32."""
        stop = start + out.shape[0]
        parts = (self._open(places[name]).get_slice(name)[start:stop].float() for places in self.places)
        total = next(parts) * self.shares[0]
        for part, share in zip(parts, self.shares[1:], strict=True):
            total.add_(part, alpha=share)
        out.copy_(total)

    def _open(self, path: Path) -> safe_open:
        if path not in self.files:
            self.files[path] = self.enter_context(safe_open(path, "pt"))
        return self.files[path]


def _table(paths: list[Path], shares: list[float], given: list[str]) -> Table:
    table = Table("checkpoint", "weight", "share")
    for path, share, text in zip(paths, shares, given, strict=True):
        table.add_row(plain(path), text.rpartition(":")[2], f"{share:.6g}")
    weights = math.fsum(float(text.rpartition(":")[2]) for text in given)
    if not math.isclose(weights, 1.0, abs_tol=1e-9):
        table.caption = f"the weights sum to {weights:g}, not 1; each was divided by that"
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="DIR:WEIGHT", help="Hugging Face directory and its weight")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write; must not exist")
    parser.add_argument(
        "--like",
        type=Path,
        metavar="DIR",
        help="directory whose dtypes, shards and side files the result gets (default: the first checkpoint)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
