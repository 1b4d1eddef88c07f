"""The optimizer's state as a rank has it: fp32 masters and moments of its own ranges, and the number of updates."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

from prism_kernels.adamw.remainder import RemainderAdamW


def own_ranges(optimizer: MegatronOptimizer) -> Iterator[tuple[Tensor, range, Tensor]]:
    """(parameter, this rank's elements of it flattened, their master) of all that this rank updates.

    A master is fp32, or the bf16 weight itself where the rest of it is a remainder in the optimizer's state.
    From megatron-core's distributed optimizer, which knows its ranges as `gbuf_ranges`.
    """
    distributed = _only(optimizer)
    for by_dtype in distributed.gbuf_ranges:
        for buckets in by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    group, order = distributed.model_param_group_index_map[parameter]
                    master = distributed.optimizer.param_groups[group]["params"][order]
                    yield parameter, range(ranges["param"].start, ranges["param"].end), master


def own_state(optimizer: MegatronOptimizer, write: bool = False) -> Iterator[tuple[Tensor, range, dict[str, Tensor]]]:
    """(parameter, this rank's elements, {"param": master, "exp_avg": ..., "exp_avg_sq": ...}), each fp32 [elements].

    Zero moments where no step was taken yet. With `write`, what is written to these tensors before the next is asked
    for is the optimizer's, however it keeps its masters.
    """
    initialise_state(optimizer)
    inner = _only(optimizer).optimizer
    for parameter, mine, master in own_ranges(optimizer):
        if isinstance(inner, RemainderAdamW) and master.dtype == torch.bfloat16:
            state = inner.unpacked(master)
            yield parameter, mine, state
            if write:
                inner.pack(master, state)
            continue
        moments = {name: inner.state[master][name].view(-1) for name in ("exp_avg", "exp_avg_sq")}
        yield parameter, mine, {"param": master.detach().view(-1), **moments}


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


def set_optimizer_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Go on as after `step` updates."""
    inner = _only(optimizer).optimizer
    counts = [state["step"] for state in inner.state.values() if "step" in state]
    for state in inner.state.values():
        if "step" in state:  # megatron-core gives all parameters one tensor
            state["step"] = torch.full_like(state["step"], step)
    if not counts:
        for group in inner.param_groups:
            group["step"] = step


def _only(optimizer: MegatronOptimizer) -> Any:
    if isinstance(optimizer, ChainedOptimizer):
        (optimizer,) = optimizer.chained_optimizers
    return optimizer
