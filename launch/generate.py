"""Text from a model: `torchrun [...] launch/generate.py --hf DIR --prompts FILE --out FILE [sampling.name=value ...]`.

The prompts are JSONL: objects with `prompt` (text) or `tokens` (ids). The output has the same objects with `response`,
`response_tokens`, `logprobs` and `finish_reason` ("stop", "length" or "context"), one line per sample, in the order of
the prompts. The layout is set by parallel.tp=2 and the like; ranks that are left over share out the prompts. What is
drawn depends on sampling.seed, the prompt's place in the file and the sample's number alone. Samples are written to
OUT.samples as they finish: the same command, in any layout, goes on from there.
"""

from prism_mcore import program

program.begin()  # before the seconds of imports, in which torchrun may be killed

import argparse
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_mcore.config import SettingsError
from prism_mcore.console import say
from prism_mcore.exit_codes import BAD_SETTINGS, DONE, FAILED
from prism_mcore.generate.checks import check
from prism_mcore.generate.settings import GenerateSettings
from prism_mcore.launching import complain, hf_parser, leave, planned_ranks, rank, read_overrides
from prism_mcore.model.spec import ModelSpec, read_spec
from prism_mcore.plan.host import check_rank_fits

if TYPE_CHECKING:
    from prism_mcore.generate.engine import Engine
    from prism_mcore.generate.prompts import PromptLine
    from prism_mcore.generate.requests import Completion, Request
    from prism_mcore.generate.settings import Sampling
    from prism_mcore.generate.unfinished import Writer
    from prism_mcore.meeting import Meeting


def main() -> int:
    arguments = _parser().parse_intermixed_args()
    try:
        settings, spec, tokenizer, lines = _read(arguments)
    except (SettingsError, ValueError, OSError) as error:
        return complain(error, BAD_SETTINGS)
    if arguments.dry_run:
        _print_plan(settings, spec, lines, arguments)
        return DONE
    from prism_mcore.convert.names import ExchangeError
    from prism_mcore.meeting import LostRank

    try:
        _generate(arguments, settings, tokenizer, lines)
    except (ExchangeError, ValueError, FloatingPointError) as error:
        return complain(error, BAD_SETTINGS)
    except (OSError, LostRank) as error:
        say(f"error: {error}", stderr=True)
        return FAILED
    return DONE


def _read(arguments: argparse.Namespace) -> tuple[GenerateSettings, ModelSpec, Any, list["PromptLine"]]:
    """Everything that can be checked before a process group: settings, model, tokenizer, prompts, where they go."""
    settings = read_overrides(GenerateSettings, arguments.overrides)
    if not arguments.out.parent.is_dir():
        raise ValueError(f"--out {arguments.out}: there is no folder {arguments.out.parent}; make it first")
    if not (arguments.hf / "config.json").is_file():
        raise ValueError(f"--hf {arguments.hf}: there is no config.json; give the model's Hugging Face directory")
    from prism_mcore.generate import unfinished  # torch takes seconds
    from prism_mcore.generate.prompts import read_prompts, tokenizer_of
    from prism_mcore.text import read_eos

    spec = read_spec(arguments.hf)
    ranks = planned_ranks(settings.parallel, arguments.dry_run)
    check(settings, spec, ranks)
    tokenizer = tokenizer_of(arguments.hf, spec)
    read_eos(arguments.hf)  # a broken file ends it here, not after the model is loaded
    if settings.sampling.stop and tokenizer is None:
        raise SettingsError(f"sampling.stop needs a tokenizer.json in {arguments.hf}; use sampling.stop_ids")
    lines, blank = read_prompts(arguments.prompts, tokenizer, spec)
    if blank and rank() == 0:
        say(f"note: {blank:,} blank lines of {arguments.prompts} were skipped", stderr=True)
    if rank() == 0 and unfinished.files(arguments.out):  # the weights may all have to be read for it
        unfinished.check(arguments.out, unfinished.case_of(arguments.hf, arguments.prompts, settings))
    if not arguments.dry_run:
        check_rank_fits(
            _memory(settings, spec, lines),
            ranks,
            f"generating with {arguments.hf}",
            "free memory, set sampling.max_tokens lower, take precision.dtype=bf16, or more GPUs (parallel.tp)",
        )
    return settings, spec, tokenizer, lines


def _memory(settings: GenerateSettings, spec: ModelSpec, lines: list["PromptLine"]) -> int:
    """Bytes that a rank needs at least: weights, a prefill, and the caches that were asked for, or of one sample."""
    from prism_mcore.plan.memory import cache_bytes, inference_bytes

    prompt, together = max(len(line.tokens) for line in lines), sum(len(line.tokens) for line in lines)
    fixed, per_token = cache_bytes(spec, settings.parallel.tp, 2 if settings.precision.dtype == "bf16" else 4)
    longest = min(prompt + settings.sampling.max_tokens, spec.max_positions)
    asked = settings.generate.cache_gb
    caches = fixed + longest * per_token if asked is None else asked * 1e9
    return math.ceil(
        inference_bytes(settings, spec, max(prompt, min(together, settings.generate.prefill_tokens))) + caches
    )


def _generate(
    arguments: argparse.Namespace, settings: GenerateSettings, tokenizer: Any, lines: list["PromptLine"]
) -> None:
    import torch.distributed as dist

    from prism_mcore import platform
    from prism_mcore.convert.online import agreed, model_from_hf
    from prism_mcore.generate import unfinished
    from prism_mcore.generate.engine import Engine
    from prism_mcore.generate.prompts import requests_of, response_lines
    from prism_mcore.meeting import Meeting
    from prism_mcore.parallel import init_groups
    from prism_mcore.text import read_eos

    device = platform.start(timeout=settings.parallel.timeout)
    groups = init_groups(settings.parallel)
    meeting = Meeting.of_all_ranks(settings.parallel.timeout)
    with agreed():
        case = unfinished.case_of(arguments.hf, arguments.prompts, settings) if groups.rank == 0 else {}
    completions = unfinished.take_over(arguments.out, case) if groups.rank == 0 else {}
    shared = [case, set(completions)]
    dist.broadcast_object_list(shared)  # before any rank writes
    case, earlier = shared
    requests = requests_of(lines, settings.sampling, earlier, groups.dp_rank, groups.dp_size)
    (model,) = model_from_hf(arguments.hf, settings, groups, device)
    engine = Engine(model, tokenizer, settings=settings.generate, eos=read_eos(arguments.hf))

    started = time.monotonic()
    with unfinished.Writer(arguments.out, groups.rank, case) if groups.tp_rank == 0 else nullcontext() as writer:
        completions |= _stream(engine, requests, settings.sampling, writer, groups, meeting)
        meeting.join()  # replicas take unequally long
        everyone = _gathered(completions, groups)
        if groups.rank == 0:
            part = Path(f"{arguments.out}.part")
            with part.open("w", encoding="utf-8") as file:
                file.writelines(response_lines(lines, everyone, tokenizer, settings.sampling))
            part.replace(arguments.out)
            _report(arguments.out, everyone, earlier, time.monotonic() - started)
        dist.barrier()  # the file is there: what it was made from can go
        if writer is not None:
            writer.remove()
    platform.shutdown()


def _stream(
    engine: "Engine",
    requests: list["Request"],
    sampling: "Sampling",
    writer: "Writer | None",
    groups: Any,
    meeting: "Meeting",
) -> dict[tuple[int, int], "Completion"]:
    """This replica's samples by (line, sample), each written when it is done."""
    completions = {}
    with _progress(sum(len(request.keys) for request in requests), groups.rank == 0) as advance:
        try:
            for completion in engine.stream(requests, sampling, meeting.working):
                _, _, line, sample = requests[completion.request].keys[completion.sample]
                completions[line, sample] = completion
                if writer is not None:
                    writer.add(line, sample, completion)
                advance()
        except (ValueError, FloatingPointError) as error:  # of this replica's prompts alone
            if groups.rank > 0 and groups.tp_rank == 0:
                say(f"error: rank {groups.rank}: {error}", stderr=True)
            raise
    return completions


def _report(
    out: Path, everyone: dict[tuple[int, int], "Completion"], earlier: set[tuple[int, int]], seconds: float
) -> None:
    lengths = [len(completion.tokens) for completion in everyone.values()]
    new = sum(len(completion.tokens) for place, completion in everyone.items() if place not in earlier)
    before = f", {len(earlier):,} of them from before," if earlier else ""
    say(
        f"{out}: {len(everyone):,} responses{before} of {sum(lengths) / len(lengths):,.1f} tokens on average"
        f" in {seconds:.1f} s ({new / seconds:,.0f} tokens/s)"
    )


def _gathered(mine: dict[tuple[int, int], "Completion"], groups: Any) -> dict[tuple[int, int], "Completion"]:
    """Every replica's completions, on the first rank."""
    import torch.distributed as dist

    ranks: list[Any] | None = [None] * groups.world_size if groups.rank == 0 else None
    dist.gather_object(mine if groups.tp_rank == 0 else {}, ranks)
    return {place: completion for part in ranks or [] for place, completion in part.items()}


def _progress(total: int, shown: bool) -> Any:
    """A progress bar; gives the function to call when a sample is done."""
    from contextlib import contextmanager

    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    from prism_mcore.console import progress

    @contextmanager
    def bar():
        columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with progress(*columns, shown=shown) as shows:
            task = shows.add_task("", total=total)
            yield lambda: shows.advance(task)

    return bar()


def _print_plan(
    settings: GenerateSettings, spec: ModelSpec, lines: list["PromptLine"], arguments: argparse.Namespace
) -> None:
    from rich.table import Table

    from prism_mcore.console import plain, show
    from prism_mcore.generate import unfinished
    from prism_mcore.plan.host import free_memory
    from prism_mcore.plan.memory import num_parameters

    done = 0
    if unfinished.files(arguments.out):
        done = len(unfinished.read(arguments.out, unfinished.case_of(arguments.hf, arguments.prompts, settings)))
    lengths = [len(line.tokens) for line in lines]
    how = settings.sampling
    table = Table(show_header=False, title="Generation", title_justify="left")
    table.add_row("model", f"{spec.family}, {num_parameters(spec):,} parameters in {settings.precision.dtype}")
    table.add_row("ranks of one replica", f"{settings.parallel.tp}")
    needed = _memory(settings, spec, lines)
    table.add_row("memory per rank", f"{needed / 1e9:.3g} GB; {free_memory() / 1e9:.3g} GB are free on this machine")
    table.add_row("prompts", f"{len(lines):,} of {min(lengths):,} to {max(lengths):,} tokens")
    table.add_row("samples", f"{len(lines) * how.samples:,} of at most {how.max_tokens:,} tokens")
    if done:
        table.add_row("done before", plain(f"{done:,} samples, in {arguments.out}.samples*"))
    table.add_row("running at once", f"at most {settings.generate.slots:,} per replica")
    show(table)


def _parser() -> argparse.ArgumentParser:
    parser = hf_parser(GenerateSettings, "--prompts FILE", __doc__)
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="JSONL: `prompt` or `tokens`")
    return parser


if __name__ == "__main__":
    leave(main())
