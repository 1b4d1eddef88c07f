"""The time of a training step by formula: products, attention, memory traffic, communication, bubble, optimizer.

A prediction, not a measurement: constants are priors from published kernels (plan/hardware.py); docs/planner.md sets
the outcome beside published runs. Every term is that of one rank of the slowest pipeline stage.
"""

# t tokens of a micro-batch on a rank, d hidden, f MLP width, i Mamba inner width, v vocabulary

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache

from prism_mcore.model.flops import head_flops, mean_keys, sublayer_flops
from prism_mcore.model.parameters import large_matrices, parameters
from prism_mcore.model.spec import ATTENTION, LAYER_NAMES, MAMBA, ModelSpec
from prism_mcore.model.split import split_layers
from prism_mcore.plan.hardware import H100, Gpu

# Dense bf16 tensor-core peaks of NVIDIA's data sheets, FLOP/s, by a part of torch's device name.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}

TUNED, TYPICAL = 0.95, 0.80  # of the predicted rate: what tuned and untuned published runs reach
FULL_TERMS, FULL_ROWS = 4096, 2048  # a product with shorter sums or fewer rows runs slower, by the root of the ratio
QUANTISING_BYTES = 6  # an element of an FP8 product's operand: read twice, two FP8 copies written
CROSS_ENTROPY_S = 2.2e-6 / 131_072  # a token and a word of the vocabulary: megatron-core's, on an H100
OPTIMIZER_BYTES = 30  # a parameter: gradient, master and two moments read and written, the weight written
BUCKET_BYTES = 160e6  # 40 M gradients: the last one is reduced when nothing is left to hide it


@dataclass(frozen=True)
class Layout:
    """How a model is trained: `Layout(gpus=64, tp=4, pp=4, vpp=5, seq_len=8192, global_batch=128, fp8=True)`."""

    gpus: int
    seq_len: int
    global_batch: int  # sequences
    micro_batch: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    sequence_parallel: bool = True  # where tp > 1
    recompute: frozenset[str] = frozenset()
    fp8: bool = False
    fp8_bf16_ends: int = 0
    optimizer_instances: int = 1

    @property
    def dp(self) -> int:
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def micro_batches(self) -> int:
        """Forward passes of one data-parallel rank in a step."""
        return self.global_batch // (self.micro_batch * self.dp)

    @property
    def tokens(self) -> float:
        """Of a micro-batch on one rank."""
        return self.micro_batch * self.seq_len / self.cp


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by what takes them, as if everything else were hidden."""

    terms: dict[str, float]
    tokens: int  # of the step
    gpus: int

    @property
    def total(self) -> float:
        return sum(self.terms.values())

    @property
    def rate(self) -> float:
        """Tokens per second and GPU, predicted; see TUNED and TYPICAL."""
        return self.tokens / self.total / self.gpus

    @property
    def bound_by(self) -> str:
        """The largest term."""
        return max(self.terms, key=lambda name: self.terms[name])


def step_time(spec: ModelSpec, layout: Layout, gpu: Gpu) -> StepTime:
    """Seconds of a step. Raises ValueError where the layout does not divide the model or the batch."""
    if layout.dp < 1 or layout.micro_batches < 1:
        raise ValueError(f"{layout.gpus} GPUs and a batch of {layout.global_batch} are too few for {layout}")
    forward, backward = _stage(spec, layout, gpu)
    one = {name: forward[name] + backward[name] for name in forward}
    count = layout.micro_batches
    terms = {name: seconds * count for name, seconds in one.items()}
    terms["pipeline bubble"] = (layout.pp - 1) / layout.vpp * sum(one.values())
    terms["stage to stage"] = _stage_to_stage(spec, layout, gpu) * count
    terms["gradients and weights"] = _data_parallel(spec, layout, gpu, sum(forward.values()), sum(backward.values()))
    shard = _parameters(spec, layout) / (layout.dp * layout.cp / layout.optimizer_instances)
    terms["optimizer"] = OPTIMIZER_BYTES * shard / gpu.bandwidth
    terms = {name: seconds for name, seconds in terms.items() if seconds}
    return StepTime(terms, layout.global_batch * layout.seq_len, layout.gpus)


def _stage(spec: ModelSpec, layout: Layout, gpu: Gpu) -> tuple[dict[str, float], dict[str, float]]:
    """(forward, backward) seconds of a micro-batch on the slowest stage, by term."""
    one = {kind: sublayer_time(spec, kind, layout, gpu, layout.fp8) for kind in set(spec.pattern)}
    plain = {kind: sublayer_time(spec, kind, layout, gpu, False) for kind in one} if layout.fp8_bf16_ends else one
    stages = []
    for stage, counts in enumerate(_kinds(spec, layout.pp, layout.vpp, layout.seq_len, layout.fp8_bf16_ends)):
        parts = [((plain if end else one)[kind], count) for (kind, end), count in counts.items()]
        if stage == layout.pp - 1:
            parts.append((_head(spec, layout, gpu), 1))
        stages.append(tuple(_summed([(part[which], count) for part, count in parts]) for which in (0, 1)))
    forward, backward = max(stages, key=lambda s: sum(s[0].values()) + sum(s[1].values()))
    names = forward | backward
    return {n: forward.get(n, 0.0) for n in names}, {n: backward.get(n, 0.0) for n in names}


@cache
def _kinds(spec: ModelSpec, pp: int, vpp: int, seq_len: int, ends: int) -> list[Counter[tuple[str, bool]]]:
    """How many sub-layers of each (kind, is it one of the `ends` at either end?) every stage has."""
    split, last = split_layers(spec, pp, vpp, seq_len), len(spec.pattern) - ends
    return [
        Counter((spec.pattern[i], not ends <= i < last) for chunk in split[stage::pp] for i in chunk)
        for stage in range(pp)
    ]


def sublayer_time(
    spec: ModelSpec, kind: str, layout: Layout, gpu: Gpu, fp8: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """(forward, backward) seconds of one sub-layer, by term; a recomputed one has its forward in both."""
    t, tp = layout.tokens, layout.tp
    shared = tp if layout.sequence_parallel else 1  # ranks that share what is done to hidden states
    matrices = large_matrices(spec, kind, tp).values()
    rate = gpu.fp8 if fp8 else gpu.bf16
    forward = {"products": sum(_product(t, n, k, rate) for n, k in matrices)}
    backward = {"products": sum(_product(t, k, n, rate) + _product(n, k, t, rate) for n, k in matrices)}
    norm = 4 * 2 * spec.hidden_size / shared
    traffic, back_traffic = _element_bytes(spec, kind)
    cast = QUANTISING_BYTES * sum(k for _, k in matrices), QUANTISING_BYTES * sum(n for n, _ in matrices)
    forward["memory-bound"] = t * (norm + traffic / tp + fp8 * cast[0]) / gpu.bandwidth
    backward["memory-bound"] = t * (norm + back_traffic / tp + fp8 * cast[1]) / gpu.bandwidth
    if kind == ATTENTION:
        scores = 4 * spec.num_heads * spec.head_dim / tp * mean_keys(layout.seq_len, spec.sliding_window) * t
        forward["attention"], backward["attention"] = scores / gpu.attention[0], 2.5 * scores / gpu.attention[1]
        gathered = 4 * spec.num_kv_heads * spec.head_dim / tp * t * (layout.cp - 1)  # keys and values of other ranks
        link = _link(gpu, tp, layout.cp)
        forward["context-parallel"], backward["context-parallel"] = gathered / link, 2 * gathered / link
    if kind == MAMBA:
        scan = (sublayer_flops(spec, kind, layout.seq_len) - _projections(spec)) / tp * t
        forward["scan"], backward["scan"] = scan / gpu.scan, 2.5 * scan / gpu.scan
        if layout.cp > 1:  # fp32 states of two chunks of each other rank
            states = 2 * (layout.cp - 1) * 4 * spec.mamba_inner_size * spec.ssm_state_size / tp
            forward["context-parallel"] = backward["context-parallel"] = states / _link(gpu, tp, layout.cp)
    if tp > 1:
        moved = (tp - 1) / tp * 2 * spec.hidden_size * t / _link(gpu, 1, tp)
        # Gather and scatter, forward and backward, and the gather again for the weights' gradients; or all-reduces.
        counts = (2, 3) if layout.sequence_parallel else (2, 2)
        forward["tensor-parallel"], backward["tensor-parallel"] = counts[0] * moved, counts[1] * moved
    if LAYER_NAMES[kind] in layout.recompute:
        backward = {name: backward.get(name, 0.0) + seconds for name, seconds in forward.items()}
    return forward, backward


def _product(m: float, n: float, k: float, rate: float) -> float:
    """Seconds of [m, k] x [k, n]."""
    return 2 * m * n * k / (rate * min(1.0, k / FULL_TERMS, m / FULL_ROWS) ** 0.5)


def _projections(spec: ModelSpec) -> float:
    """Forward FLOPs per token of Mamba's linears."""
    return sum(2 * n * k for n, k in large_matrices(spec, MAMBA, 1).values())


def _element_bytes(spec: ModelSpec, kind: str) -> tuple[float, float]:
    """Bytes per token that a sub-layer's own elementwise kernels move, forward and backward, over all ranks."""
    if kind == ATTENTION:
        rotated = 2 * 2 * (spec.num_heads + spec.num_kv_heads) * spec.head_dim * (spec.position == "rope")
        return rotated, rotated
    if kind == MAMBA:
        inner, groups = spec.mamba_inner_size, spec.ssm_groups * spec.ssm_state_size
        conv = 2 * 2 * (inner + 2 * groups)
        scan = 2 * (3 * inner + 2 * groups)  # x and the gate read, y written, and B, C
        states = 4 * 4 * inner * spec.ssm_state_size / spec.chunk_len  # written, passed on (read, written), read
        gated = 2 * 3 * inner
        return conv + scan + states + gated, 1.5 * conv + 2 * scan + 2 * states + 2 * 5 * inner
    width = spec.ffn_size * (1 if spec.activation == "swiglu" else 2 / 3)  # without a gate a third less each way
    return 2 * 3 * width, 2 * 5 * width


def _head(spec: ModelSpec, layout: Layout, gpu: Gpu) -> tuple[dict[str, float], dict[str, float]]:
    t, loss = layout.tokens, CROSS_ENTROPY_S * spec.vocab_size * (H100.bandwidth / gpu.bandwidth)
    product = head_flops(spec) / gpu.bf16
    return (
        {"head and loss": t / layout.tp * (product + loss / 3)},
        {"head and loss": t / layout.tp * (2 * product + loss * 2 / 3)},
    )


def _parameters(spec: ModelSpec, layout: Layout) -> float:
    """Of one rank: an even share of the stages."""
    return _on_a_rank(spec, layout.tp) / layout.pp


@cache
def _on_a_rank(spec: ModelSpec, tp: int) -> float:
    table = parameters(spec, tp).values()
    return sum(math.prod(p.shape) / (1 if p.tp_axis is None else tp) for p in table)


def _stage_to_stage(spec: ModelSpec, layout: Layout, gpu: Gpu) -> float:
    """Seconds of a micro-batch's hidden states and their gradients, sent on; an interleaved schedule hides them."""
    if layout.pp == 1 or layout.vpp > 1:
        return 0.0
    width = 2 * spec.hidden_size / (layout.tp if layout.sequence_parallel else 1)
    return 2 * layout.tokens * width / (gpu.nvlink if layout.gpus <= gpu.per_node else gpu.network)


def _data_parallel(spec: ModelSpec, layout: Layout, gpu: Gpu, forward: float, backward: float) -> float:
    """Seconds of reducing gradients (fp32) and gathering weights (bf16) that one micro-batch does not hide."""
    ranks = layout.dp * layout.cp
    if ranks == 1:
        return 0.0
    held, shards = _parameters(spec, layout), ranks // layout.optimizer_instances
    link, share = _link(gpu, layout.tp, shards), (shards - 1) / shards
    reduce, gather = 4 * held * share / link, 2 * held * share / link
    if layout.optimizer_instances > 1:  # each shard's gradients are added over the replicas
        copies = layout.optimizer_instances
        reduce += 2 * 4 * held / shards * (copies - 1) / copies / _link(gpu, layout.tp * shards, copies)
    bucket = min(1.0, BUCKET_BYTES / (4 * held))
    return max(reduce * bucket, reduce - backward) + max(gather * bucket, gather - forward)


def _link(gpu: Gpu, stride: int, ranks: int) -> float:
    """Bytes/s of a collective of ranks that are `stride` GPUs apart; a node's members of it use their network cards."""
    if stride * ranks <= gpu.per_node:
        return gpu.nvlink
    return min(gpu.nvlink, max(1, gpu.per_node // stride) * gpu.network)


def _summed(parts: list[tuple[dict[str, float], int]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part, count in parts:
        for name, seconds in part.items():
            total[name] = total.get(name, 0.0) + count * seconds
    return total


def peak_flops(device_name: str) -> float | None:
    """The bf16 peak of a GPU by its name, such as "NVIDIA H100 80GB HBM3", in FLOP/s; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)
