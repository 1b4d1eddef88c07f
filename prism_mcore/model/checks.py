"""Does a layout fit a model? What several programs' checks share; pure, without torch, before any process group.

Every problem says what was got, what was needed and, where there is one, the nearest value that works.
"""

from collections.abc import Collection
from math import lcm

from prism_kernels.table import check_choices
from prism_mcore.config import Findings
from prism_mcore.model.parameters import large_matrices
from prism_mcore.model.settings import BuildSettings, ModelSettings, config_beside
from prism_mcore.model.spec import LAYER_NAMES, ModelSpec, read_spec
from prism_mcore.parallel import ParallelSettings

FP8_MULTIPLE = 16  # of rows, columns and tokens: cuBLAS reads FP8 matrices in lines of 16 bytes


def check_build(settings: BuildSettings, spec: ModelSpec, world_size: int, found: Findings) -> int | None:
    """What every program asks: do ranks, layout, formats and backends fit? The data-parallel size; None if not."""
    dp = _check_ranks(settings.parallel, world_size, found)
    _check_tensor_parallel(settings.parallel, spec, found)
    if settings.precision.fp8 != "off":
        _check_fp8(settings, spec, found)
    try:
        check_choices(settings.kernels)
    except ValueError as error:
        found.problems.append(str(error))
    return dp


def _check_ranks(parallel: ParallelSettings, world_size: int, found: Findings) -> int | None:
    ranks = parallel.tp * parallel.pp * parallel.cp
    if world_size % ranks:
        found.problems.append(
            f"{world_size} ranks are not a multiple of tp*pp*cp={ranks}; {nearest_multiples(world_size, ranks)}"
        )
        return None
    dp = world_size // ranks
    sharing = dp * parallel.cp  # ranks over which the optimizer is sharded
    if sharing % parallel.optimizer_instances:
        found.problems.append(
            f"parallel.optimizer_instances={parallel.optimizer_instances} does not divide the {sharing} data-parallel"
            f" ranks; try {_closest_divisors(sharing, parallel.optimizer_instances)}"
        )
    return dp


def _check_tensor_parallel(parallel: ParallelSettings, spec: ModelSpec, found: Findings) -> None:
    tp = parallel.tp
    counts = {"attention heads": spec.num_heads, "key/value heads": spec.num_kv_heads, "MLP columns": spec.ffn_size}
    if "M" in spec.pattern:
        counts["Mamba heads"] = spec.mamba_num_heads
        if spec.ssm_groups > 1:  # one group is replicated, several are dealt out whole
            counts["SSM groups"] = spec.ssm_groups
    for what, count in counts.items():
        if count % tp:
            found.problems.append(
                f"parallel.tp={tp} does not divide the model's {count} {what}; try {_closest_divisors(count, tp)}"
            )
    if parallel.sequence_parallel and tp == 1:
        found.problems.append("parallel.sequence_parallel=true needs parallel.tp > 1; set it to false")
    if padding := -spec.vocab_size % tp:
        found.notes.append(f"vocabulary of {spec.vocab_size} is padded by {padding} rows to a multiple of tp={tp}")


def _check_fp8(settings: BuildSettings, spec: ModelSpec, found: Findings) -> None:
    fp8, ends, tp = settings.precision.fp8, settings.precision.fp8_bf16_ends, settings.parallel.tp
    if 2 * ends >= len(spec.pattern):
        found.problems.append(
            f"precision.fp8_bf16_ends={ends} leaves none of the {len(spec.pattern)} sub-layers in FP8; use at most"
            f" {(len(spec.pattern) - 1) // 2}, or precision.fp8=off"
        )
    if misfits := _fp8_misfits(spec, tp):
        fitting = [n for n in range(1, 65) if not _fp8_misfits(spec, n) and spec.ffn_size % n == 0]
        nearest = sorted(fitting, key=lambda n: abs(n - tp))[:1]
        advice = f"parallel.tp={nearest[0]}, or precision.fp8=off" if nearest else "precision.fp8=off"
        found.problems.append(
            f"precision.fp8={fp8} multiplies multiples of {FP8_MULTIPLE}; at parallel.tp={tp} a rank has"
            f" {', '.join(misfits)}; use {advice}"
        )


def _fp8_misfits(spec: ModelSpec, tp: int) -> list[str]:
    """The large matrices whose shard has a side that FP8 products do not take: `1288 rows of mamba's in_proj`."""
    return [
        f"{size:g} {side} of {LAYER_NAMES[kind]}'s {matrix}"
        for kind in dict.fromkeys(spec.pattern)
        for matrix, shape in large_matrices(spec, kind, tp).items()
        for side, size in zip(("rows", "columns"), shape, strict=True)
        if size % FP8_MULTIPLE and size % 1 == 0  # what tp does not divide is said already
    ]


def check_fp8_tokens(name: str, tokens: int, settings: BuildSettings, found: Findings) -> None:
    """Do a micro-batch's tokens, which a weight's gradient sums over, fit FP8 products? `name` is what sets them."""
    parallel = settings.parallel
    multiple = FP8_MULTIPLE * parallel.cp * (parallel.tp if parallel.sequence_parallel else 1)
    if settings.precision.fp8 != "off" and tokens % multiple:
        found.problems.append(
            f"{name} is {tokens} tokens; precision.fp8={settings.precision.fp8} needs a multiple of {multiple};"
            f" {nearest_multiples(tokens, multiple)}"
        )


def check_pipeline(parallel: ParallelSettings, spec: ModelSpec, found: Findings) -> None:
    """Stages and virtual stages, for programs that can have several."""
    layers, chunks = len(spec.pattern), parallel.pp * parallel.vpp
    if parallel.vpp > 1 and parallel.pp == 1:
        found.problems.append(f"parallel.vpp={parallel.vpp} needs a pipeline; set parallel.pp > 1 or parallel.vpp=1")
    if layers < chunks:
        found.problems.append(
            f"pp*vpp={chunks} chunks are more than the model's {layers} sub-layers; use at most {layers}"
        )
    _check_split(parallel.split, layers, chunks, found)


def _check_split(split: str | list[int], layers: int, chunks: int, found: Findings) -> None:
    if isinstance(split, str):  # auto
        return
    if len(split) != chunks:
        found.problems.append(f"parallel.split has {len(split)} numbers; needed: pp*vpp={chunks}, or auto")
    if sum(split) != layers:
        found.problems.append(f"parallel.split sums to {sum(split)}; needed: the model's {layers} sub-layers")
    if any(count < 1 for count in split):
        found.problems.append(f"parallel.split={split} leaves a chunk empty; needed: at least 1 sub-layer each")


def check_one_stage(parallel: ParallelSettings, spec: ModelSpec, found: Findings) -> None:
    """The same for programs that generate."""
    check_whole_sequences(parallel, found)
    if parallel.pp > 1 or parallel.vpp > 1:
        found.problems.append(
            f"parallel.pp={parallel.pp}, vpp={parallel.vpp}: rollouts are generated on one stage; use pp=1 and vpp=1,"
            " and more tp where the model does not fit"
        )
    else:
        _check_split(parallel.split, len(spec.pattern), 1, found)


def check_whole_sequences(parallel: ParallelSettings, found: Findings) -> None:
    """For programs whose ranks hold whole sequences."""
    if parallel.cp > 1:
        found.problems.append(
            f"parallel.cp={parallel.cp}: only mid-training shards sequences; caches, rollouts and scores are of whole"
            " ones. Use parallel.cp=1: the ranks are then data-parallel"
        )


def check_context_shards(name: str, tokens: int, settings: BuildSettings, found: Findings) -> None:
    """Can context-parallel ranks share a micro-batch of so many tokens? `name` is what sets them."""
    parallel = settings.parallel
    if parallel.cp == 1:
        return
    multiple = lcm(2 * parallel.cp, parallel.cp * parallel.tp if parallel.sequence_parallel else 1)
    if tokens % multiple:
        of = "2*cp" if multiple == 2 * parallel.cp else "2*cp and, under sequence_parallel, cp*tp"
        found.problems.append(
            f"{name} is {tokens} tokens; parallel.cp={parallel.cp} needs a multiple of {of} = {multiple};"
            f" {nearest_multiples(tokens, multiple)}"
        )
    exact = [op for op in ("attention", "causal_conv1d", "ssd_scan") if settings.kernels.get(op) == "exact"]
    if exact:
        found.problems.append(
            f"kernels.{exact[0]}=exact has whole documents on every rank; use parallel.cp=1, or another backend"
        )


def check_positions(name: str, length: int, spec: ModelSpec, found: Findings) -> None:
    """Has the model so many positions? `name` is what messages call the length."""
    if length <= spec.max_positions:
        return
    excess = f"{name}={length} is longer than the model's {spec.max_positions} positions"
    if spec.position == "rope":
        found.problems.append(f"{excess}; use at most {spec.max_positions}, or model.rope.positions")
    else:
        found.notes.append(f"{excess}; it has no position embedding, so nothing breaks, but it was not trained on it")


def check_recompute(recompute: Collection[str], spec: ModelSpec, found: Findings) -> None:
    """Note kinds of sub-layers that the model does not have."""
    unused = [kind for kind in recompute if kind not in {LAYER_NAMES[c] for c in spec.pattern}]
    if unused:
        found.notes.append(f"train.recompute names {', '.join(unused)}: the model has no such sub-layer")


def check_initial_weights(model: ModelSettings, spec: ModelSpec, found: Findings) -> None:
    """Where model.spec and the config.json beside the weights say different things, a run computes the first."""
    init = None if model.spec is None or model.init == "random" else config_beside(model.init)
    if init is None:
        return
    try:
        differences = spec.differences(read_spec(init))
    except ValueError as error:
        found.problems.append(str(error))
        return
    if differences:
        listed = ", ".join(f"{name}={ours} (there {theirs})" for name, (ours, theirs) in differences.items())
        found.notes.append(f"model.spec is not {init}/config.json, which exports of the run will have: {listed}")


def nearest_multiples(value: int, of: int) -> str:
    """`try 96 or 104`: the multiples of `of` around a value that is none."""
    below = value // of * of
    return f"try {below} or {below + of}" if below else f"try {of}"


def _closest_divisors(value: int, to: int) -> str:
    """The largest divisor of `value` below `to` and the smallest above it, where there are such."""
    divisors = [n for n in range(1, value + 1) if value % n == 0]
    return " or ".join(str(n) for n in [d for d in divisors if d < to][-1:] + [d for d in divisors if d > to][:1])
