"""What is in a checkpoint: the model's and the optimizer's tensors as megatron-core describes them, by global name."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model

from prism_mcore.checkpoint.optimizer_state import sharded_optimizer
from prism_mcore.parallel import Groups

__all__ = ["ShardedTensor", "ShardedTensorFactory", "fill", "layout", "sharded_tensors"]


def sharded_tensors(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, groups: Groups, is_loading: bool
) -> dict[str, Any]:
    """{"model": ..., "optimizer": ...} of this rank; without an optimizer, the model alone."""
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": groups.dp_cp}
    model: dict[str, Any] = {}
    for chunk in unwrap_model(list(chunks)):  # names without the wrappers' "module."
        model.update(chunk.sharded_state_dict(metadata=metadata))
    tensors: dict[str, Any] = {"model": model}
    if optimizer is not None:
        tensors["optimizer"] = sharded_optimizer(optimizer, model, is_loading, metadata)
    return tensors


@torch.no_grad()
def fill(weights: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> None:
    """Copy what was loaded into the model; plain tensors were read in place, those cut into parts were not."""
    for name, weight in weights.items():
        if loaded[name].data_ptr() != weight.data_ptr():
            weight.copy_(loaded[name])


def layout(groups: Groups) -> dict[str, int]:
    """The degrees in which a checkpoint was saved."""
    fields = ("tp_size", "pp_size", "vpp", "dp_size", "cp_size")
    return {field.removesuffix("_size"): getattr(groups, field) for field in fields}
