"""A prompt file answered: every replica its share, samples kept as they finish, one file at the end."""

import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from prism_mcore import platform
from prism_mcore.console import progress_bar, say
from prism_mcore.convert.online import agreed, model_from_hf
from prism_mcore.generate import unfinished
from prism_mcore.generate.engine import Engine
from prism_mcore.generate.prompts import PromptLine, requests_of, response_lines
from prism_mcore.generate.requests import Completion, Request
from prism_mcore.generate.settings import GenerateSettings, Sampling
from prism_mcore.meeting import Meeting
from prism_mcore.parallel import Groups, init_groups
from prism_mcore.text import Tokenizer, read_eos


def run(
    hf: Path, prompts: Path, out: Path, settings: GenerateSettings, tokenizer: Tokenizer | None, lines: list[PromptLine]
) -> None:
    """Answer the lines of `prompts` with the model in `hf` and write `out`; every rank calls it.

    Samples of an earlier try that lie beside `out` are taken over. Raises ExchangeError for a model that cannot be read
    and an `out` that others write, ValueError and FloatingPointError for what cannot be generated, LostRank where
    another rank is gone.
    """
    device = platform.start(timeout=settings.parallel.timeout)
    groups = init_groups(settings.parallel)
    meeting = Meeting.of_all_ranks(settings.parallel.timeout)
    case: unfinished.Case = {}
    completions: dict[unfinished.Place, Completion] = {}
    with ExitStack() as opened:
        with agreed():
            if groups.rank == 0:
                unfinished.hold(out, opened)
                case = unfinished.case_of(hf, prompts, settings)
                completions = unfinished.take_over(out, case)
        shared: list[Any] = [case, set(completions)]
        dist.broadcast_object_list(shared)  # before any rank writes
        case, earlier = shared
        requests = requests_of(lines, settings.sampling, earlier, groups.dp_rank, groups.dp_size)
        (model,) = model_from_hf(hf, settings, groups, device)
        engine = Engine(model, tokenizer, settings=settings.generate, eos=read_eos(hf))

        started = time.monotonic()
        with unfinished.Writer(out, groups.rank, case) if groups.tp_rank == 0 else nullcontext() as writer:
            completions |= _stream(engine, requests, settings.sampling, writer, groups, meeting)
            meeting.join()  # replicas take unequally long
            everyone = _gathered(completions, groups)
            if groups.rank == 0:
                part = Path(f"{out}.part")
                with part.open("w", encoding="utf-8") as file:
                    file.writelines(response_lines(lines, everyone, tokenizer, settings.sampling))
                part.replace(out)
                _report(out, everyone, earlier, time.monotonic() - started)
            dist.barrier()  # the file is there: what it was made from can go
            if writer is not None:
                writer.remove()
    platform.shutdown()


def _stream(
    engine: Engine,
    requests: list[Request],
    sampling: Sampling,
    writer: unfinished.Writer | None,
    groups: Groups,
    meeting: Meeting,
) -> dict[tuple[int, int], Completion]:
    """This replica's samples by (line, sample), each written when it is done."""
    completions = {}
    total = sum(len(request.keys) for request in requests)
    with progress_bar("generating", total, shown=groups.rank == 0) as advance:
        try:
            for completion in engine.stream(requests, sampling, meeting.working):
                _, _, line, sample = requests[completion.request].keys[completion.sample]
                completions[line, sample] = completion
                if writer is not None:
                    writer.add(line, sample, completion)
                advance(1)
        except (ValueError, FloatingPointError) as error:  # of this replica's prompts alone
            if groups.rank > 0 and groups.tp_rank == 0:
                say(f"error: rank {groups.rank}: {error}", stderr=True)
            raise
    return completions


def _report(
    out: Path, everyone: dict[tuple[int, int], Completion], earlier: set[tuple[int, int]], seconds: float
) -> None:
    lengths = [len(completion.tokens) for completion in everyone.values()]
    new = sum(len(completion.tokens) for place, completion in everyone.items() if place not in earlier)
    before = f", {len(earlier):,} of them from before," if earlier else ""
    say(
        f"{out}: {len(everyone):,} responses{before} of {sum(lengths) / len(lengths):,.1f} tokens on average"
        f" in {seconds:.1f} s ({new / seconds:,.0f} tokens/s)"
    )


def _gathered(mine: dict[tuple[int, int], Completion], groups: Groups) -> dict[tuple[int, int], Completion]:
    """Every replica's completions, on the first rank."""
    ranks: list[Any] | None = [None] * groups.world_size if groups.rank == 0 else None
    dist.gather_object(mine if groups.tp_rank == 0 else {}, ranks)
    return {place: completion for part in ranks or [] for place, completion in part.items()}
