"""The time of an RL step by formula: rollouts, bound by memory or products, and what is learnt from them.

A prediction, not a measurement. Generation is counted at a mean response length that the caller assumes: every replica
decodes its rollouts together, and the few that are longer than the mean cost nothing extra, as if others took their
place. A step whose longest responses are waited for takes longer.
"""

import math
from dataclasses import replace

from prism_mcore.model.spec import ModelSpec
from prism_mcore.plan.hardware import Gpu
from prism_mcore.plan.memory import cache_bytes, num_parameters
from prism_mcore.plan.throughput import Layout, step_time

WEIGHT_BYTES = 2  # bf16


def rl_step_seconds(
    spec: ModelSpec, layout: Layout, gpu: Gpu, *, rollouts: int, response_tokens: int, reference: bool
) -> dict[str, float]:
    """Seconds of a step by what takes them.

    layout: of the update, with the context as seq_len; its global_batch is not read. rollouts: of the step, all ranks.
    reference: a KL term scores every rollout once more.
    """
    packs = math.ceil(rollouts * response_tokens / layout.seq_len / layout.micro_batch)
    packed = replace(layout, global_batch=layout.micro_batch * layout.dp * max(1, math.ceil(packs / layout.dp)))
    update = step_time(spec, packed, gpu).total
    return {
        "generate": response_tokens * decode_seconds(spec, layout.tp, gpu, rollouts / layout.dp, response_tokens / 2),
        "score": update / 3 * (1 + reference),  # forward passes alone
        "update": update,
    }


def decode_seconds(spec: ModelSpec, tp: int, gpu: Gpu, running: float, context: float) -> float:
    """Seconds in which a replica of `tp` GPUs adds a token to each of its running sequences of so many tokens."""
    per_sequence, per_token = cache_bytes(spec, tp, WEIGHT_BYTES)
    parameters = num_parameters(spec) / tp
    traffic = WEIGHT_BYTES * parameters + running * (2 * per_sequence + context * per_token)  # states are written, too
    return max(traffic / gpu.bandwidth, 2 * parameters * running / gpu.bf16)
