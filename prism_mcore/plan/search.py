"""Which layout trains a model fastest on so many GPUs? Every one that fits, by predicted time, in seconds."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, combinations, product

from prism_mcore.config import Findings
from prism_mcore.model.checks import check_build, check_context_shards, check_fp8_tokens, check_pipeline
from prism_mcore.model.settings import KernelSettings, PrecisionSettings
from prism_mcore.model.spec import LAYER_NAMES, ModelSpec
from prism_mcore.parallel import ParallelSettings
from prism_mcore.plan.hardware import Gpu
from prism_mcore.plan.memory import plan_memory
from prism_mcore.plan.throughput import Layout, StepTime, step_time

LEAST_TOKENS = 8192  # of a sequence on a context-parallel rank
RESERVED = 8e9  # bytes of a GPU's memory for the CUDA context, NCCL's buffers, workspaces and fragmentation


@dataclass(frozen=True)
class Build:
    """What checking and planning read of a layout."""

    parallel: ParallelSettings
    precision: PrecisionSettings
    kernels: KernelSettings


@dataclass(frozen=True)
class Plan:
    """A layout with its predicted time, and bytes of its fullest rank."""

    layout: Layout
    time: StepTime
    memory: int


def search(
    spec: ModelSpec, gpu: Gpu, *, gpus: int, seq_len: int, global_batch: int, fp8: tuple[bool, ...], best: int
) -> list[Plan]:
    """The `best` fastest layouts that fit in memory, the fastest first.

    fp8: which of with and without are allowed. Raises ValueError where none fits, naming the one that comes closest.
    """
    layouts = _layouts(spec, gpu, gpus, seq_len, global_batch, fp8)
    timed = sorted(((step_time(spec, layout, gpu), layout) for layout in layouts), key=lambda each: each[0].total)
    found: list[Plan] = []
    without: set[Layout] = set()  # layouts but for their recomputation: more of it than fits is only slower
    closest: Plan | None = None
    for time, layout in timed:
        kind = replace(layout, recompute=frozenset())
        if kind in without:
            continue
        plan = Plan(layout, time, memory_of(spec, layout))
        if plan.memory + RESERVED <= gpu.memory:
            found.append(plan)
            without.add(kind)
        elif closest is None or plan.memory < closest.memory:
            closest = plan
        if len(found) == best:
            break
    if not found:
        raise ValueError(_nothing_fits(spec, gpu, gpus, global_batch, closest))
    return found


def _nothing_fits(spec: ModelSpec, gpu: Gpu, gpus: int, global_batch: int, closest: Plan | None) -> str:
    if closest is None:
        return (
            f"no layout of {spec.family} divides {gpus} GPUs and a batch of {global_batch} sequences; try a batch that"
            f" is a multiple of {gpus}, or fewer GPUs"
        )
    layout = closest.layout
    return (
        f"nothing fits into {gpus} x {(gpu.memory - RESERVED) / 1e9:.0f} GB; the closest is tp={layout.tp}"
        f" pp={layout.pp} with {closest.memory / 1e9:.0f} GB a GPU; use more GPUs, or shorter sequences"
    )


def build_of(layout: Layout) -> Build:
    """The settings of a layout, as recipes have them."""
    return Build(
        ParallelSettings(
            tp=layout.tp,
            pp=layout.pp,
            vpp=layout.vpp,
            cp=layout.cp,
            sequence_parallel=layout.sequence_parallel and layout.tp > 1,
            optimizer_instances=layout.optimizer_instances,
        ),
        PrecisionSettings(fp8="tensorwise" if layout.fp8 else "off", fp8_bf16_ends=layout.fp8_bf16_ends),
        {},
    )


def memory_of(spec: ModelSpec, layout: Layout) -> int:
    """Bytes of the fullest rank."""
    stages = plan_memory(
        build_of(layout),
        spec,
        layout.gpus,
        seq_len=layout.seq_len,
        micro_batch=layout.micro_batch,
        micro_batches=layout.micro_batches,
        recompute=layout.recompute,
    )
    return max(stage.total for stage in stages)


def _layouts(
    spec: ModelSpec, gpu: Gpu, gpus: int, seq_len: int, global_batch: int, fp8: tuple[bool, ...]
) -> Iterator[Layout]:
    """Every layout that the engine would accept."""
    kinds = sorted({LAYER_NAMES[kind] for kind in spec.pattern})
    recomputes = [frozenset(s) for s in chain.from_iterable(combinations(kinds, n) for n in range(len(kinds) + 1))]
    # Products want thousands of rows: shorter sequences are not shared.
    cps = [cp for cp in (1, 2, 4, 8, 16) if cp == 1 or seq_len >= LEAST_TOKENS * cp]
    for tp, pp, vpp, cp in product((1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 3, 4, 5, 8), cps):
        if gpus % (tp * pp * cp) or (vpp > 1 and pp == 1):
            continue
        shards = gpus // (tp * pp)  # of gradients and of the optimizer: dp x cp
        for instances in sorted({1, max(1, shards * tp // gpu.per_node)}):
            if shards % instances:
                continue
            for in_fp8, micro_batch in product(fp8, (1, 2, 4, 8)):
                layout = Layout(
                    gpus, seq_len, global_batch, micro_batch, tp, pp, vpp, cp, fp8=in_fp8, optimizer_instances=instances
                )
                if _accepted(spec, layout):
                    for recompute in recomputes:
                        yield replace(layout, recompute=recompute)


def _accepted(spec: ModelSpec, layout: Layout) -> bool:
    rows = layout.micro_batch * layout.dp
    if layout.global_batch % rows or (layout.vpp > 1 and layout.micro_batches % layout.pp):
        return False
    found, build = Findings(), build_of(layout)
    check_build(build, spec, layout.gpus, found)
    check_pipeline(build.parallel, spec, found)
    check_context_shards("", layout.micro_batch * layout.seq_len, build, found)
    check_fp8_tokens("", layout.micro_batch * layout.seq_len, build, found)
    return not found.problems
