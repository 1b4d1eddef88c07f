"""What an RL run will need, as --dry-run prints it."""

from rich.table import Table

from prism_mcore.model.flops import flops_per_token
from prism_mcore.model.spec import ModelSpec
from prism_mcore.parallel import data_parallel_size
from prism_mcore.plan import report
from prism_mcore.plan.memory import StageMemory, cache_bytes, kept_weight_bytes, num_parameters, plan_memory
from prism_mcore.rl.settings import RLSettings


def plan(settings: RLSettings, spec: ModelSpec, world_size: int) -> list[Table]:
    """Layout, memory and work of checked settings."""
    return [
        report.layout(settings, spec, world_size, "as the rollouts' lengths pack"),
        report.memory(memory_of(settings, spec, world_size)),
        _rollout_memory(settings, spec, world_size),
        _work(settings, spec),
    ]


def memory_of(settings: RLSettings, spec: ModelSpec, world_size: int) -> list[StageMemory]:
    """The memory of one rank while it updates; one micro-batch is in flight at a time."""
    rl, train = settings.rl, settings.train
    return plan_memory(
        settings,
        spec,
        world_size,
        seq_len=rl.context,
        micro_batch=train.micro_batch,
        recompute=train.recompute,
        masters=settings.optimizer.masters,
    )


def _rollout_memory(settings: RLSettings, spec: ModelSpec, world_size: int) -> Table:
    tp, context = settings.parallel.tp, settings.rl.context
    per_sequence, per_token = cache_bytes(spec, tp, 2 if settings.precision.dtype == "bf16" else 4)
    rows = []
    if settings.rl.kl_coefficient:
        shards = data_parallel_size(settings.parallel, world_size) // settings.parallel.optimizer_instances
        rows.append(("reference policy", f"{4 * num_parameters(spec) / tp / shards / report.GB:.3g} GB"))
    if kept := kept_weight_bytes(settings, spec):
        rows.append(("weights in FP8", f"{kept / report.GB:.3g} GB while rollouts are generated"))
    whole = per_sequence + context * per_token
    rows += [
        ("cache of a sequence", f"{per_sequence / 2**20:.3g} MiB + {per_token / 2**10:.3g} KiB a token"),
        (f"at rl.context={context:,} tokens", f"{whole / report.GB:.3g} GB"),
    ]
    return report.facts("Memory of rollouts per rank", rows)


def _work(settings: RLSettings, spec: ModelSpec) -> Table:
    rl, sampling = settings.rl, settings.sampling
    count = rl.prompts_per_step * sampling.samples
    model = flops_per_token(spec, rl.context)
    scoring = 1 / 3 if rl.kl_coefficient else 0.0  # the reference's forward pass
    return report.facts(
        "Work",
        [
            ("rollouts per step", f"{rl.prompts_per_step} prompts x {sampling.samples} = {count:,}"),
            ("response tokens per step", f"at most {count * sampling.max_tokens:,}"),
            ("rollouts of the run", f"{count * settings.train.steps:,}"),
            ("model FLOPs per token", f"at most {model * (1 + 1 / 3 + scoring):.4g} generated, scored and trained on"),
        ],
    )
