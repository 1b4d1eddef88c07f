"""Log-probability of every next token: `torchrun [...] launch/score.py --hf DIR --tokens FILE --out FILE`.

The tokens are JSON, a list of equal-length lists of token ids. The output is a safetensors file with `logprobs`
[n, len - 1] fp32, log p of each next token, and with --logits `logits` [n, len, vocab] fp32. The layout is set by
parallel.tp=2 and the like, numbers by precision.dtype=fp32; ranks that are left over share out the sequences.
"""

from prism_mcore import program

program.begin()  # before the seconds of imports, in which torchrun may be killed

import argparse
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_mcore.config import SettingsError
from prism_mcore.console import say
from prism_mcore.evaluate.checks import check
from prism_mcore.evaluate.settings import ScoreSettings
from prism_mcore.exit_codes import BAD_SETTINGS, DONE, FAILED
from prism_mcore.launching import complain, hf_parser, leave, planned_ranks, positive, read_overrides
from prism_mcore.model.spec import ModelSpec, read_spec
from prism_mcore.plan.host import check_rank_fits

if TYPE_CHECKING:
    from torch import Tensor


def main() -> int:
    arguments = _parser().parse_intermixed_args()
    try:
        settings, spec, tokens = _read(arguments)
    except (SettingsError, ValueError, OSError) as error:
        return complain(error, BAD_SETTINGS)
    if arguments.dry_run:
        _print_plan(arguments, settings, spec, tokens)
        return DONE
    from prism_mcore.convert.names import ExchangeError
    from prism_mcore.meeting import LostRank

    try:
        _score(arguments, settings, spec, tokens)
    except ExchangeError as error:  # the same on every rank
        return complain(error, BAD_SETTINGS)
    except (OSError, LostRank) as error:
        say(f"error: {error}", stderr=True)
        return FAILED
    return DONE


def _read(arguments: argparse.Namespace) -> tuple[ScoreSettings, ModelSpec, "Tensor"]:
    """Everything that can be checked before a process group: settings, model, tokens and where they go."""
    settings = read_overrides(ScoreSettings, arguments.overrides)
    if not arguments.out.parent.is_dir():
        raise ValueError(f"--out {arguments.out}: there is no folder {arguments.out.parent}; make it first")
    spec = read_spec(arguments.hf)
    from prism_mcore.evaluate.scoring import read_token_lists  # torch and megatron-core take seconds

    tokens = read_token_lists(arguments.tokens, spec.vocab_size)
    ranks = planned_ranks(settings.parallel, arguments.dry_run)
    check(settings, spec, ranks, tokens.shape[1])
    if not arguments.dry_run:
        check_rank_fits(
            _memory(arguments, settings, spec, tokens),
            ranks,
            f"scoring with {arguments.hf}",
            "free memory, take a smaller --micro-batch, precision.dtype=bf16, or more GPUs (parallel.tp)",
        )
    return settings, spec, tokens


def _memory(arguments: argparse.Namespace, settings: ScoreSettings, spec: ModelSpec, tokens: "Tensor") -> int:
    """Bytes that a rank needs at most."""
    from prism_mcore.plan.memory import inference_bytes

    return inference_bytes(settings, spec, arguments.micro_batch * tokens.shape[1], logits=arguments.logits)


def _score(arguments: argparse.Namespace, settings: ScoreSettings, spec: ModelSpec, tokens: "Tensor") -> None:
    import torch.distributed as dist

    from prism_mcore import platform
    from prism_mcore.convert.online import model_from_hf
    from prism_mcore.evaluate.scoring import ScoreFile, score
    from prism_mcore.meeting import Meeting
    from prism_mcore.parallel import init_groups

    device = platform.start(timeout=settings.parallel.timeout)
    groups = init_groups(settings.parallel)
    meeting = Meeting.of_all_ranks(settings.parallel.timeout)
    chunks = model_from_hf(arguments.hf, settings, groups, device, seq_len=tokens.shape[1])
    file = ScoreFile(arguments.out, _shapes(arguments, spec, tokens))
    if groups.rank == 0:
        file.create()
    dist.barrier()

    def write(sequences: list[int], logprobs: "Tensor", logits: "Tensor | None") -> None:
        for place, sequence in enumerate(sequences):
            file.write("logprobs", sequence, logprobs[place])
            if logits is not None:
                file.write("logits", sequence, logits[place])

    started = time.monotonic()
    total = (
        -(-len(tokens) // groups.dp_size) * settings.parallel.vpp
    )  # of this rank; every virtual stage sees each sequence
    with _progress(total) if groups.rank == 0 else nullcontext(lambda sequences: None) as advance:

        def done(sequences: int) -> None:
            meeting.working()
            advance(sequences)

        score(chunks, tokens, groups, write, micro_batch=arguments.micro_batch, logits=arguments.logits, on_batch=done)
    file.close()
    meeting.join()  # nodes may be unequally fast
    if groups.rank == 0:
        file.publish()
        seconds = time.monotonic() - started
        say(
            f"{arguments.out}: {len(tokens):,} sequences of {tokens.shape[1]:,} tokens"
            f" in {seconds:.1f} s ({tokens.numel() / seconds:,.0f} tokens/s)"
        )
    platform.shutdown()


def _shapes(arguments: argparse.Namespace, spec: ModelSpec, tokens: "Tensor") -> dict[str, tuple[int, ...]]:
    n, length = tokens.shape
    logits = {"logits": (n, length, spec.vocab_size)} if arguments.logits else {}
    return {"logprobs": (n, length - 1), **logits}


def _progress(total: int) -> AbstractContextManager[Any]:
    """A progress bar; gives the function to call with the number of sequences that were started."""
    from contextlib import contextmanager

    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    from prism_mcore.console import progress

    @contextmanager
    def bar():
        columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with progress(*columns) as shows:
            task = shows.add_task("", total=total)
            yield lambda sequences: shows.advance(task, sequences)

    return bar()


def _print_plan(arguments: argparse.Namespace, settings: ScoreSettings, spec: ModelSpec, tokens: "Tensor") -> None:
    import math

    from rich.table import Table

    from prism_mcore.console import show
    from prism_mcore.plan.host import free_memory
    from prism_mcore.plan.memory import num_parameters, plan_memory

    parallel = settings.parallel
    ranks = parallel.tp * parallel.pp
    weights = max(stage.weights for stage in plan_memory(settings, spec, ranks, seq_len=tokens.shape[1]))
    size = 4 * sum(math.prod(shape) for shape in _shapes(arguments, spec, tokens).values())
    table = Table(show_header=False, title="Scoring", title_justify="left")
    table.add_row("model", f"{spec.family}, {num_parameters(spec):,} parameters in {settings.precision.dtype}")
    table.add_row("ranks of one replica", f"{ranks} = tp {parallel.tp} x pp {parallel.pp}")
    table.add_row("weights per rank", f"{weights / 1e9:.3g} GB")
    needed = _memory(arguments, settings, spec, tokens)
    table.add_row("memory per rank", f"{needed / 1e9:.3g} GB; {free_memory() / 1e9:.3g} GB are free on this machine")
    table.add_row("sequences", f"{len(tokens):,} of {tokens.shape[1]:,} tokens, {arguments.micro_batch} at a time")
    table.add_row("output", f"{size / 1e9:.3g} GB")
    show(table)


def _parser() -> argparse.ArgumentParser:
    parser = hf_parser(ScoreSettings, "--tokens FILE [--logits]", __doc__)
    parser.add_argument("--tokens", type=Path, required=True, metavar="FILE", help="JSON: equal-length lists of ids")
    parser.add_argument("--logits", action="store_true", help="write the logits of every position, too")
    parser.add_argument(
        "--micro-batch", type=positive, default=1, metavar="N", help="sequences in a forward pass (default: 1)"
    )
    return parser


if __name__ == "__main__":
    leave(main())
