"""A Hugging Face directory with random bf16 weights: `python tools/make_random_model.py CONFIG DIR [--seed N]`.

CONFIG is a config.json, or the name of one of the shapes that come with prism_mcore (llama-3.1-8b, nemotron-h-8b, ...).
For tests of exchange, verification and speed at real sizes: no weight is downloaded, and none is held in memory but a
block of rows.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from prism_mcore.console import progress, say
from prism_mcore.convert.names import hf_tensors
from prism_mcore.convert.write import conventional_directory, write_directory
from prism_mcore.model.spec import read_spec

SHAPES = Path(__file__).parents[1] / "prism_mcore" / "model" / "configs"


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        make(options.config, options.out, options.seed)
    except (ValueError, OSError) as error:
        say(f"make_random_model: {error}", stderr=True)
        return 1
    return 0


def make(config: str, out: Path, seed: int = 0) -> None:
    """Write the directory, which must not exist, shard by shard."""
    shipped = SHAPES / f"{config}.json"
    file = shipped if shipped.is_file() else Path(config)
    spec = read_spec(file)
    names = [name for name, tensor in hf_tensors(spec).items() if not tensor.optional]
    with tempfile.TemporaryDirectory() as folder:
        side = Path(folder) / "config.json"
        shutil.copyfile(file, side)
        layout = conventional_directory(spec, Path(folder), (side,), dict.fromkeys(names, torch.bfloat16))
        size = sum(entry.end - entry.start for _, _, entry in layout.entries())
        columns = (TextColumn("drawing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with progress(*columns) as shows:
            bar = shows.add_task("", total=size)
            write_directory(out, layout, lambda *rows: draw(seed, *rows), lambda done: shows.advance(bar, done))
    say(f"{out}: {spec.family}, {len(names):,} tensors in {len(layout.shards)} files, {size / 1e9:.3g} GB")


def draw(seed: int, name: str, row: int, out: Tensor) -> None:
    """Rows of a tensor from `row` on, each block a pure function of (seed, name, row): of a size that a trained model's
    have, so that activations neither vanish nor overflow.
    """
    digest = hashlib.sha256(f"{seed}/{name}/{row}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    kind = name.rsplit(".", 2)[-2:]
    if "A_log" in kind:
        out.copy_(torch.empty(out.shape).uniform_(1, 16, generator=generator).log())
    elif "dt_bias" in kind:
        steps = torch.empty(out.shape).uniform_(-7, -2.3, generator=generator).exp()  # 0.001 to 0.1
        out.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus gives them back
    elif out.dim() == 1 and "bias" not in kind:  # norms, D
        out.copy_(torch.empty(out.shape).uniform_(0.5, 1.5, generator=generator))
    else:
        out.normal_(0, 0.02, generator=generator)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ", ".join(sorted(path.stem for path in SHAPES.glob("*.json")))
    parser.add_argument("config", metavar="CONFIG", help=f"a config.json, or one of {shapes}")
    parser.add_argument("out", type=Path, metavar="DIR", help="directory to write; must not exist")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights (default: 0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
