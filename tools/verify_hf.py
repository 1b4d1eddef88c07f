"""Compare our model with transformers, layer by layer: `python tools/verify_hf.py HF_DIR [--tp N --pp N]`.

Both run on the CPU in fp32, one after the other, ours on tp x pp processes, and each has the weights of one layer at a
time: a 24B model takes some 6 GB of memory. Every sub-layer's output and the logits are compared twice, with ours fed
with what transformers gave (a difference is found where it begins) and with ours fed with ours from the embedding on;
differences are relative to the largest number of transformers'. A sub-layer alone must be within the tolerance, and
what n sub-layers have made within sqrt(n) times it: their roundings add like steps of a random walk. The exit code is
0 where all are, 1 where one is not, 2 where they could not be compared.
"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from prism_mcore import program
from prism_mcore.console import progress, say, show, styled
from prism_mcore.convert.read import read_directory
from prism_mcore.convert.reference import VOCABULARY_ROWS, decoder_layers, output_names, write_reference
from prism_mcore.evaluate.checks import check
from prism_mcore.evaluate.settings import ScoreSettings
from prism_mcore.model.parameters import parameters
from prism_mcore.model.spec import ModelSpec
from prism_mcore.plan.host import PROCESS_BYTES, check_fits

if TYPE_CHECKING:
    from prism_mcore.convert.sublayers import Difference

FP32 = 4  # bytes
STAGE_TIME = timedelta(hours=6)  # a stage waits for those before it


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    program.expect_warnings()
    try:
        differences = verify(options)
    except (ValueError, OSError) as error:
        say(f"verify_hf: {error}", stderr=True)
        return 2
    failed = [d.output for place, d in enumerate(differences) if not _agrees(d, place, options.tolerance)]
    show(_table(differences, options.tolerance))
    if failed:
        say(f"FAIL: {len(failed)} of {len(differences)} outputs differ, the first is {failed[0]}")
        return 1
    chained = options.tolerance * math.sqrt(len(differences) - 1)
    say(f"PASS: all {len(differences)} outputs agree within {options.tolerance:g}, chained {chained:.2g}")
    return 0


def verify(options: argparse.Namespace) -> list["Difference"]:
    """The differences of every output, in the order of the forward pass."""
    from prism_mcore.evaluate.files import read_token_lists

    source = read_directory(options.hf)
    spec = source.spec()
    source.tensors(spec)  # what is missing or too much is said here, once
    tokens = (
        torch.tensor(read_token_lists(options.tokens, spec.vocab_size))
        if options.tokens
        else random_tokens(spec, options.length)
    )
    settings = ScoreSettings.model_validate(
        {
            "parallel": {"tp": options.tp, "pp": options.pp, "sequence_parallel": options.sequence_parallel},
            "precision": {"dtype": "fp32"},
        }
    )
    check(settings, spec, options.tp * options.pp, tokens.shape[1])
    check_fits(
        needed_bytes(spec, tokens.numel(), options.tp, options.pp),
        f"verifying {options.hf} on {options.tp * options.pp} processes",
        "free memory, or take fewer processes (--tp, --pp) or tokens (--length)",
    )
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(1, get_context("spawn"), program.end_with_parent, (os.getpid(),)) as process:
            try:
                process.submit(_run_transformers, options.hf, tokens, Path(folder)).result()
            except BrokenProcessPool as error:
                raise ValueError("the process that ran transformers was killed, for lack of memory perhaps") from error
        with gpus_hidden():
            found = {d.output: d for d in _run_ranks(options.hf, settings, tokens, Path(folder))}
    return [found[name] for name in output_names(spec)]


def needed_bytes(spec: ModelSpec, tokens: int, tp: int, pp: int) -> int:
    """The most memory that all processes have together, transformers' first and ours then: the largest layer in fp32,
    the largest tensor of it as the file has it, and what a forward pass over the tokens makes.
    """
    sizes = [0] * len(spec.pattern)
    largest = spec.hidden_size * VOCABULARY_ROWS
    for name, parameter in parameters(spec).items():
        if name.startswith("layers."):
            elements = math.prod(parameter.shape)
            sizes[int(name.split(".")[1])] += elements
            largest = max(largest, elements)
    piece = FP32 * VOCABULARY_ROWS * (spec.hidden_size + 3 * tokens)
    widest = max(spec.ffn_size or 0, 2 * spec.mamba_inner_size + spec.mamba_num_heads, 2 * spec.hidden_size)
    working = FP32 * tokens * 8 * widest
    if spec.mamba_num_heads:
        # transformers' scan: two products of chunks x chunks x heads x state (or head) in fp32, and copies of them
        working += FP32 * tokens * 32 * spec.mamba_num_heads * 3 * spec.ssm_state_size
    theirs = max(sum(sizes[i] for i in layer) for layer in decoder_layers(spec))
    own = max(sizes) + tp * largest  # a rank reads whole rows, whatever it keeps of them
    first = 2 * PROCESS_BYTES + max(FP32 * (theirs + largest) + working, piece)
    then = (1 + tp * pp) * PROCESS_BYTES + max(FP32 * own + tp * working, tp * piece)
    return max(first, then)


def random_tokens(spec: ModelSpec, length: int) -> Tensor:
    """[2, length] token ids, the same every time."""
    return torch.randint(spec.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


@contextmanager
def gpus_hidden() -> Iterator[None]:
    """Processes started inside compute on the CPU, as transformers does here."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _run_transformers(hf: Path, tokens: Tensor, folder: Path) -> None:
    """In a process of its own: its memory is given back."""
    with _bar("transformers", len(decoder_layers(read_directory(hf).spec())) + 1) as advance:
        write_reference(hf, tokens, folder, advance)


def _run_ranks(hf: Path, settings: ScoreSettings, tokens: Tensor, reference: Path) -> list["Difference"]:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=settings.parallel.tp * settings.parallel.pp,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        run_id="verify_hf",
    )
    try:
        return [d for rank in elastic_launch(config, compare)(hf, settings, tokens, reference).values() for d in rank]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        told = failure.message["message"] if isinstance(failure.message, dict) else failure.message
        raise ValueError(f"rank {rank}: {told}") from error


@record
def compare(hf: Path, settings: ScoreSettings, tokens: Tensor, reference: Path) -> list["Difference"]:
    """One rank of ours: what this rank has to say of the outputs that it computes."""
    program.expect_warnings()
    from prism_mcore import platform
    from prism_mcore.convert.sublayers import Sublayers
    from prism_mcore.evaluate.scoring import one_document_each
    from prism_mcore.model.split import split_layers
    from prism_mcore.parallel import init_groups

    parallel = settings.parallel
    platform.start(timeout=STAGE_TIME)
    groups = init_groups(parallel, timeout=STAGE_TIME)
    source = read_directory(hf)
    layers = split_layers(source.spec(), parallel.pp, 1, tokens.shape[1], parallel.split)[groups.pp_rank]
    padding = -tokens.numel() % (parallel.tp if parallel.sequence_parallel else 1)
    with _bar(f"prism_mcore, stage {groups.pp_rank}", len(layers), shown=groups.tp_rank == 0) as advance:
        found = Sublayers(
            source,
            groups,
            one_document_each(tokens, padding),
            reference,
            kernels=settings.kernels,
            sequence_parallel=parallel.sequence_parallel,
            on_layer=advance,
        ).compare(layers)
    platform.shutdown()
    return found


@contextmanager
def _bar(what: str, total: int, shown: bool = True):
    """A progress bar of layers; gives the function to call after each."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with progress(*columns, shown=shown) as shows:
        task = shows.add_task("", total=total)
        yield lambda: shows.advance(task)


def _agrees(d: "Difference", sublayers: int, tolerance: float) -> bool:
    """sublayers: how many have worked on the output."""
    return d.alone <= tolerance and d.chained <= tolerance * math.sqrt(max(1, sublayers))  # a nan is not


def _table(differences: list["Difference"], tolerance: float) -> Table:
    table = Table("output", "fed with transformers'", "fed with ours", "")
    for place, d in enumerate(differences):
        verdict = styled("ok", "green") if _agrees(d, place, tolerance) else styled("differs", "red")
        table.add_row(d.output, f"{d.alone:.2e}", f"{d.chained:.2e}", verdict)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf", type=Path, metavar="HF_DIR", help="Hugging Face directory with the model")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks (default: 1)")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline stages (default: 1)")
    parser.add_argument("--sequence-parallel", action="store_true", help="cut activations over the tensor ranks")
    parser.add_argument(
        "--tokens", type=Path, metavar="FILE", help="JSON: equal-length lists of token ids (default: random ones)"
    )
    parser.add_argument(
        "--length", type=int, default=128, metavar="N", help="tokens of each of the 2 random sequences (default: 128)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        metavar="X",
        help="largest relative difference of a sub-layer (default: 1e-5)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
