"""An evaluation's generations: every task in turn on one model, samples kept as they finish."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from prism_mcore import platform
from prism_mcore.console import progress_bar, say
from prism_mcore.convert.identity import identity
from prism_mcore.convert.online import agreed, model_from_hf
from prism_mcore.evaluate import samples as kept
from prism_mcore.evaluate.jobs import Job
from prism_mcore.evaluate.samples import Place, Sample, response_of
from prism_mcore.evaluate.settings import EvaluateSettings
from prism_mcore.generate import unfinished
from prism_mcore.generate.engine import Engine
from prism_mcore.meeting import Meeting
from prism_mcore.parallel import Groups, init_groups
from prism_mcore.text import read_eos


def generate(hf: Path, out: Path, settings: EvaluateSettings, jobs: Sequence[Job]) -> str:
    """Make the samples that are missing with the model in `hf`; every rank calls it.

    The first gets the model's identity, the others "".
    Raises as generate/run.py does.
    """
    device = platform.start(timeout=settings.parallel.timeout)
    groups = init_groups(settings.parallel)
    meeting = Meeting.of_all_ranks(settings.parallel.timeout)
    with ExitStack() as opened:
        shared: list[Any] = [None, None]
        with agreed():
            if groups.rank == 0:
                out.mkdir(exist_ok=True)
                unfinished.hold(out, opened)
                model = identity(hf)
                shared = [model, [_take_over(job, model) for job in jobs]]
        dist.broadcast_object_list(shared)  # before any rank writes
        model, earlier = shared
        engine: Engine | None = None
        for job, done in zip(jobs, earlier, strict=True):
            if set(job.places) <= done:
                continue
            if engine is None:
                (chunk,) = model_from_hf(hf, settings, groups, device)
                engine = Engine(chunk, job.tokenizer, settings=settings.generate, eos=read_eos(hf))
            _generate(job, done, engine, model, groups, meeting)
        meeting.join()
        dist.barrier()  # every file is written
        if groups.rank == 0:
            for job in jobs:
                _take_over(job, model)
    platform.shutdown()
    return model if groups.rank == 0 else ""


@contextmanager
def named_failures(groups: Groups) -> Iterator[None]:
    """Say what fails on one replica alone: the first rank, which says the rest, has no part in it."""
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        if groups.rank > 0 and groups.tp_rank == 0:
            say(f"error: rank {groups.rank}: {error}", stderr=True)
        raise


def _take_over(job: Job, model: str) -> set[Place]:
    """Put what every rank wrote into one file; the places of what can be used."""
    case = job.case(model)
    samples = job.earlier(case)
    if samples:
        order = {place: number for number, place in enumerate(job.places)}
        ordered = sorted(samples.values(), key=lambda sample: (order.get(sample.place, len(order)), sample.place))
        kept.take_over(job.out, case, ordered)
    return set(samples)


def _generate(job: Job, done: set[Place], engine: Engine, model: str, groups: Groups, meeting: Meeting) -> None:
    """This replica's missing samples of a task, each written when it is done."""
    requests, places = job.requests(done, groups.dp_rank, groups.dp_size)
    problems = {problem.key: problem for problem in job.problems}
    total, tokens, begun = sum(map(len, places)), 0, time.monotonic()
    writing = groups.tp_rank == 0
    assert job.tokenizer is not None
    with (
        named_failures(groups),
        kept.Writer(job.out, groups.rank, job.case(model)) if writing else nullcontext() as writer,
        progress_bar(job.task.title, total, shown=groups.rank == 0) as advance,
    ):
        for completion in engine.stream(requests, job.sampling, meeting.working):
            place = places[completion.request][completion.sample]
            if writer is not None:
                problem, prompt = problems[place[0]], job.prompt(problems[place[0]], place[1])
                writer.keep(
                    Sample(
                        question=problem.id,
                        key=place[0],
                        sample=place[1],
                        prompt=prompt.hash,
                        response=response_of(job.tokenizer, completion, prompt.text[-32:], job.sampling.stop),
                        tokens=list(completion.tokens),
                        logprob=float(completion.logprobs.mean()),
                        finish=completion.finish,
                        in_think=job.in_think(problem, place[1]),
                    )
                )
            tokens += len(completion.tokens)
            advance(1)
    meeting.join()  # replicas take unequally long
    if groups.rank == 0:
        seconds = time.monotonic() - begun
        say(
            f"{job.task.title}: {total:,} samples on this replica in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)"
            + (f", {len(done):,} from before" if done else "")
        )
