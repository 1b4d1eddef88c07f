"""The optimizer in a checkpoint: moments and fp32 weights by global name, and the number of updates."""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer


def sharded_optimizer(
    optimizer: MegatronOptimizer, model: ShardedStateDict, is_loading: bool, metadata: dict[str, Any]
) -> ShardedStateDict:
    """megatron-core's description of the optimizer's tensors; `model` is that of its parameters."""
    initialise_state(optimizer)
    state = _only(optimizer).sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    # The rest of it is hyper-parameters, which come from the settings, and the step, which is in state.json.
    return state["param_state"]


def initialise_state(optimizer: MegatronOptimizer) -> None:
    """Zero moments where no step was taken yet: megatron-core cannot describe the state of an untouched optimizer."""
    distributed = _only(optimizer)
    inner = distributed.optimizer
    if inner.state:
        return
    distributed.init_state_fn(inner, distributed.config)
    if isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
        for group in inner.param_groups:
            for parameter in group["params"]:
                device = parameter.device if group["fused"] or group["capturable"] else None
                inner.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=device)


def optimizer_step(optimizer: MegatronOptimizer) -> int:
    """Updates taken: torch's Adam counts them for each parameter, Transformer Engine's and apex's for each group."""
    inner = _only(optimizer).optimizer
    counts = [state["step"] for state in inner.state.values() if "step" in state]
    counts = counts or [group["step"] for group in inner.param_groups if "step" in group]
    return max((int(count) for count in counts), default=0)


def load_optimizer(optimizer: MegatronOptimizer, param_state: dict[int, Any], step: int) -> None:
    """Give the optimizer what was loaded under `sharded_optimizer`, after `step` updates."""
    distributed = _only(optimizer)
    state = distributed.state_dict()
    for group in state["optimizer"]["param_groups"]:
        group["step"] = step
    state["param_state"], state["param_state_sharding_type"] = param_state, "fully_reshardable"
    distributed.load_state_dict(state)
    # megatron-core gives all parameters one tensor, and none where Transformer Engine or apex is installed.
    for own in distributed.optimizer.state.values():
        if "step" in own:
            own["step"] = torch.full_like(own["step"], step)


def _only(optimizer: MegatronOptimizer) -> Any:
    if isinstance(optimizer, ChainedOptimizer):
        (optimizer,) = optimizer.chained_optimizers
    return optimizer
