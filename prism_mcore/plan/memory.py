"""Device memory of every pipeline stage, by formula: what a layout will need before a GPU is asked for.

Not counted: the CUDA context, NCCL's buffers, workspaces and fragmentation; leave some 8 GB for them. Activations are
those of fused operations, each keeping what its backward pass reads and nothing else. Measured with the reference ops,
an MLP keeps what is planned, attention up to 1.4 times and a Mamba mixer 2 (fp32) to 3 (bf16) times as much.
"""

# d hidden, h heads, k key/value heads, p head_dim, f MLP width, i Mamba inner width, g SSM groups, n SSM state

import math
from collections.abc import Collection
from dataclasses import dataclass

from prism_kernels.loss import CHUNK_BYTES, MOST_ROUNDED_SUMS
from prism_mcore.model.parameters import Parameter, large_matrices, padded_vocabulary, parameters
from prism_mcore.model.settings import BuildSettings
from prism_mcore.model.spec import ATTENTION, LAYER_NAMES, MAMBA, MLP, ModelSpec
from prism_mcore.model.split import split_layers
from prism_mcore.parallel import ParallelSettings, data_parallel_size


@dataclass(frozen=True)
class StageMemory:
    """What one rank of a pipeline stage holds; sizes in bytes.

    Llama-3.1-8B, TP 2 + SP, 128 GPUs, optimizer sharded over 4: StageMemory(stage=0, layers=64, parameters=4015263744,
    weights=8.0e9, gradients=16.1e9, optimizer=12.0e9, activations=20.0e9, loss=1.6e9,
    saved=14.1e9)
    """

    stage: int
    layers: int  # sub-layers, over all virtual stages
    parameters: int
    weights: int
    gradients: int  # fp32, summed over micro-batches
    optimizer: int  # this rank's share of fp32 master weights and two moments
    activations: int  # of all micro-batches in flight, and the working set of one sub-layer
    loss: int  # a chunk of logits, and the gradients of the output layer and of its input
    saved: int  # what it writes of weights and optimizer: in host memory until written, where saving is asynchronous

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


def num_parameters(spec: ModelSpec) -> int:
    """Parameters of the whole model; tied embeddings count once, vocabulary padding does not."""
    return sum(math.prod(parameter.shape) for parameter in parameters(spec).values())


def plan_memory(
    settings: BuildSettings,
    spec: ModelSpec,
    world_size: int,
    *,
    seq_len: int,
    micro_batch: int = 1,
    micro_batches: int = 1,
    recompute: Collection[str] = (),
    masters: str = "fp32",
) -> list[StageMemory]:
    """The memory of one rank of each pipeline stage while it trains; needs checked settings.

    seq_len: tokens of a sequence. micro_batch: sequences of a forward pass. micro_batches: forward passes of a rank in
    a step. recompute: names of sub-layer types as in train.recompute. masters: as optimizer.masters.
    """
    parallel, tokens = settings.parallel, micro_batch * seq_len // settings.parallel.cp
    split = split_layers(spec, parallel.pp, parallel.vpp, seq_len, parallel.split)
    shards = data_parallel_size(parallel, world_size) * parallel.cp // parallel.optimizer_instances
    bf16 = settings.precision.dtype == "bf16"
    stages = []
    for stage in range(parallel.pp):
        layers = [index for chunk in split[stage :: parallel.pp] for index in chunk]
        half, full = 0, 0  # parameters in bf16 and in fp32
        for parameter, count in _stage_parameters(spec, parallel.tp, parallel.pp, stage, layers):
            half, full = (half + count, full) if bf16 and not parameter.fp32 else (half, full + count)
        stages.append(
            StageMemory(
                stage=stage,
                layers=len(layers),
                parameters=half + full,
                weights=2 * half + 4 * full,
                gradients=4 * (half + full),
                # fp32 parameters are their own masters; of a remainder the first half is the weight
                optimizer=math.ceil(((12 if masters == "fp32" else 10) * half + 8 * full) / shards),
                activations=math.ceil(tokens * _activations(settings, spec, stage, layers, micro_batches, recompute)),
                loss=_loss(settings, spec, tokens) if stage == parallel.pp - 1 else 0,
                saved=math.ceil((14 * half + 12 * full) / shards),
            )
        )
    return stages


def inference_bytes(settings: BuildSettings, spec: ModelSpec, tokens: int, *, logits: bool = False) -> int:
    """The most that a rank takes for forward passes over `tokens` tokens each, without gradients.

    Weights, the working set of one sub-layer, the hidden states, and a chunk of logits or, with `logits`, all of them.
    """
    parallel, element = settings.parallel, 2 if settings.precision.dtype == "bf16" else 4
    stages = plan_memory(settings, spec, parallel.tp * parallel.pp, seq_len=tokens)
    kinds = (kept_bytes_per_token(spec, k, parallel.tp, parallel.sequence_parallel, element) for k in set(spec.pattern))
    working = tokens * max(everything for _, everything in kinds)
    rows = padded_vocabulary(spec, parallel.tp)
    head = tokens * rows * (element + 2 * 4) if logits else min(tokens * rows * element, CHUNK_BYTES)
    return max(stage.weights for stage in stages) + 2 * working + head


def cache_bytes(spec: ModelSpec, tp: int, element: int) -> tuple[int, int]:
    """(fixed, per token) bytes that generation keeps of one sequence on one rank of a whole model.

    Fixed: Mamba's scan state in fp32 and its convolution's last inputs. Per token: keys and values.
    """
    mamba, attention = spec.pattern.count(MAMBA), spec.pattern.count(ATTENTION)
    per_token = attention * 2 * spec.num_kv_heads * spec.head_dim * element / tp
    if not mamba:
        return 0, math.ceil(per_token)
    groups = spec.ssm_groups * spec.ssm_state_size * (tp if spec.ssm_groups == 1 else 1)  # one group is on every rank
    channels = spec.mamba_inner_size + 2 * groups
    state = 4 * spec.mamba_inner_size * spec.ssm_state_size + channels * (spec.conv_kernel - 1) * element
    return math.ceil(mamba * state / tp), math.ceil(per_token)


def kept_weight_bytes(settings: BuildSettings, spec: ModelSpec) -> int:
    """The large linears' weights in FP8, a byte a number, which decoding steps read; 0 without FP8."""
    if settings.precision.fp8 == "off":
        return 0
    ends = settings.precision.fp8_bf16_ends
    inside = spec.pattern[ends : len(spec.pattern) - ends]
    of_kind = {k: sum(map(math.prod, large_matrices(spec, k, settings.parallel.tp).values())) for k in set(inside)}
    return math.ceil(sum(of_kind[kind] for kind in inside))


def _stage_parameters(spec: ModelSpec, tp: int, pp: int, stage: int, layers: list[int]) -> list[tuple[Parameter, int]]:
    """(row of the table, elements on one tensor-parallel rank) for each parameter of the stage."""
    mine = {str(index) for index in layers}
    found = []
    for name, parameter in parameters(spec, tp).items():
        if name.startswith("layers."):
            here = name.split(".")[1] in mine
        elif name.startswith("embedding."):  # tied: the last stage holds a copy
            here = stage == 0 or (spec.tied_embeddings and stage == pp - 1)
        else:
            here = stage == pp - 1
        if here:
            found.append((parameter, _local_elements(parameter, tp)))
    return found


def _local_elements(parameter: Parameter, tp: int) -> int:
    rows, *rest = parameter.shape
    if parameter.vocabulary:
        rows = math.ceil(rows / tp) * tp
    return rows * math.prod(rest) // (1 if parameter.tp_axis is None else tp)


def kept_bytes_per_token(
    spec: ModelSpec, kind: str, tp: int, sequence_parallel: bool, element: int, fp8: bool = False
) -> tuple[int, int]:
    """(input, everything) that one sub-layer keeps for its backward pass, bytes per token on one rank.

    Everything, in elements: input and normed input 2d; attention (h+2k)p queries, keys and values, (h+k)p of them again
    where they are rotated, hp, and in fp32 a log-sum-exp and, where queries and keys are normed, a statistic of each;
    MLP 3f with a gate, 2f without; Mamba-2 [z|x|dt] and [B|C] before the convolution, [x|B|C] after it, the scan's and
    the norm's output, and in fp32 the state at each chunk's start. Divided by tp, the d terms only under sequence
    parallelism. With FP8 what a product reads is kept in it: of a normed input all tokens, attention's output as well.
    """
    outer = spec.hidden_size / (tp if sequence_parallel else 1)
    read = 1 if fp8 else element  # bytes of what a product reads, an MLP's, norm's or gated norm's output
    if kind == ATTENTION:
        copies = 3 if spec.position == "rope" else 2
        statistics = spec.num_heads + (spec.num_heads + spec.num_kv_heads if spec.qk_norm else 0)
        inside: float = copies * (spec.num_heads + spec.num_kv_heads) * spec.head_dim * element + 4 * statistics
        inside += spec.num_heads * spec.head_dim * fp8
    elif kind == MLP:
        inside = ((2 if spec.activation == "swiglu" else 1) * element + read) * spec.ffn_size
    else:
        assert kind == MAMBA, kind
        inner, groups = spec.mamba_inner_size, spec.ssm_groups * spec.ssm_state_size
        groups *= tp if spec.ssm_groups == 1 else 1  # one group is on every rank
        states = 4 * inner * spec.ssm_state_size / spec.chunk_len
        inside = (4 * inner + spec.mamba_num_heads + 4 * groups) * element + 4 * spec.mamba_num_heads + states
        inside += inner * read
    normed = spec.hidden_size if fp8 else outer * element
    return math.ceil(outer * element), math.ceil(outer * element + normed + inside / tp)


def _activations(
    settings: BuildSettings,
    spec: ModelSpec,
    stage: int,
    layers: list[int],
    micro_batches: int,
    recompute: Collection[str],
) -> float:
    """Bytes per token of a micro-batch that a rank of this stage keeps for its backward passes."""
    parallel, precision = settings.parallel, settings.precision
    element, ends = 2 if precision.dtype == "bf16" else 4, precision.fp8_bf16_ends
    kept, working = 0, 0
    for index in layers:
        kind, fp8 = spec.pattern[index], precision.fp8 != "off" and ends <= index < len(spec.pattern) - ends
        own, everything = kept_bytes_per_token(spec, kind, parallel.tp, parallel.sequence_parallel, element, fp8)
        kept += own if LAYER_NAMES[kind] in recompute else everything
        working = max(working, everything + (_gathered(spec, parallel, element) if kind == ATTENTION else 0))
    return kept * _micro_batches_in_flight(parallel.pp, parallel.vpp, stage, micro_batches) + working


def _gathered(spec: ModelSpec, parallel: ParallelSettings, element: int) -> int:
    """Bytes per token of this rank of the keys and values that its chunks see: as received, laid out, and joined."""
    if parallel.cp == 1:
        return 0
    return math.ceil(3 * (parallel.cp + 0.5) * 2 * spec.num_kv_heads * spec.head_dim * element / parallel.tp)


def _micro_batches_in_flight(pp: int, vpp: int, stage: int, micro_batches: int) -> float:
    """Most forward passes of a stage whose backward is still to come, in whole stages (1F1B, or interleaved)."""
    if vpp == 1:
        return min(pp - stage, micro_batches)
    warmup = (pp - stage - 1) * 2 + (vpp - 1) * pp  # in chunks, megatron-core's get_pp_rank_microbatches
    return min(warmup + 1, micro_batches * vpp) / vpp


def _loss(settings: BuildSettings, spec: ModelSpec, tokens: int) -> int:
    """A chunk of logits, and the gradients of the output layer and of its input, as prism_kernels' fused loss has them.

    The first is summed in the model's format, over many chunks in fp32 and then cast.
    """
    tp, element = settings.parallel.tp, 2 if settings.precision.dtype == "bf16" else 4
    rows = padded_vocabulary(spec, tp) // tp
    logits = rows * tokens * element
    summed = element if logits <= MOST_ROUNDED_SUMS * CHUNK_BYTES else 4 + element
    return min(logits, CHUNK_BYTES) + spec.hidden_size * (rows * summed + tokens * element)
