"""AdamW through megatron-core's distributed optimizer: fp32 masters and moments, sharded over data-parallel ranks."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    clip_grads,
    get_megatron_optimizer,
)
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor

from prism_kernels.adamw.remainder import RemainderAdamW
from prism_mcore.config import SettingsError
from prism_mcore.megatron_patches import restore_gradient_reduction
from prism_mcore.model.hybrid import HybridModel
from prism_mcore.parallel import Groups
from prism_mcore.train.settings import OptimizerSettings

PADDED_FROM = 64  # data-parallel ranks, from which on gradient buckets are padded


def wrap(
    chunks: list[HybridModel],
    groups: Groups,
    *,
    optimizer_instances: int = 1,
    overlap: bool = False,
    grad_reduce: str = "fp32",
    bucket_size: int = 0,
) -> list[DistributedDataParallel]:
    """Give each chunk flat parameter and fp32 gradient buffers, reduced over data-parallel ranks.

    overlap: reduce gradients while backward goes on, and gather updated parameters while forward does. grad_reduce,
    bucket_size: as the optimizer's settings.
    """
    restore_gradient_reduction()
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        reduce_scatter_with_fp32_accumulation=grad_reduce == "bf16",
        use_distributed_optimizer=True,
        num_distributed_optimizer_instances=optimizer_instances,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        bucket_size=bucket_size or None,
        # NCCL's rings are fast for messages that divide by a large power of two, which matters where they are many.
        pad_buckets_for_high_nccl_busbw=groups.dp_cp.size() >= PADDED_FROM,
    )
    # Without `disable_bucketing`, by which Megatron-LM gathers bf16 and fp32 weights of an interleaved schedule's later
    # chunks in one collective: gloo then returns garbage (torch 2.13).
    wrapped = [
        DistributedDataParallel(chunk.config, config, chunk, pg_collection=groups.collection) for chunk in chunks
    ]
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_gradients
        if overlap:
            no_sync = [ddp.no_sync for ddp in wrapped]  # gradients travel after the last micro-batch only
            chunk.config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return wrapped


def build_optimizer(
    chunks: list[DistributedDataParallel], settings: OptimizerSettings, groups: Groups
) -> MegatronOptimizer:
    """AdamW over the wrapped chunks; no weight decay on one-dimensional tensors: norms, biases, A_log, D, dt_bias."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=chunks[0].config.bf16,
        params_dtype=chunks[0].config.params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(
        config,
        chunks,
        config_overrides=_groups(settings),
        use_gloo_process_groups=False,
        pg_collection=groups.collection,
    )
    model: HybridModel = chunks[0].module
    remainder = settings.masters == "remainder" and config.bf16
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None:  # this rank holds a share of the parameters
            backend = model.context.ops.backends["adamw"].name
            part.optimizer = _with_remainders(backend, part) if remainder else _adamw(backend, part.optimizer)
    return optimizer


def _with_remainders(backend: str, part: Any) -> RemainderAdamW:
    """AdamW over a part's bf16 weights themselves, whose fp32 masters are let go.

    The distributed optimizer copies masters to weights after a step: torch copies nothing onto itself.
    """
    if backend in ("te", "apex"):
        raise SettingsError(
            f"optimizer.masters=remainder is our own AdamW's, got kernels.adamw={backend}; use triton, or torch"
        )
    masters: dict[int, Any] = {}
    for models, weights, halves in zip(
        part.model_float16_groups, part.shard_float16_groups, part.shard_fp32_from_float16_groups, strict=True
    ):
        masters |= {id(master): weight for master, weight in zip(halves, weights, strict=True)}
        halves[:] = weights
        for model, weight in zip(models, weights, strict=True):
            model.main_param = weight
    for group in part.optimizer.param_groups:
        group["params"] = [masters.get(id(param), param) for param in group["params"]]
    return RemainderAdamW(part.optimizer.param_groups, backend)


def _adamw(backend: str, theirs: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The chosen AdamW over the parameter groups of megatron-core's, which takes the first it can import.

    All of them keep the same state, under the same names.
    """
    package = {"transformer_engine": "te", "apex": "apex"}.get(type(theirs).__module__.split(".")[0], "torch")
    if backend in ("te", "apex"):
        if backend != package:
            raise SettingsError(
                f"kernels.adamw={backend}: megatron-core has taken {package}'s; ask for that, or for triton"
            )
        return theirs
    if backend == "triton":
        from prism_kernels.adamw.triton import FusedAdamW

        return _over(theirs.param_groups, FusedAdamW)
    ours = theirs if package == "torch" else _over(theirs.param_groups, torch.optim.AdamW)
    for group in ours.param_groups:
        group["fused"], group["foreach"] = backend == "torch", False  # one pass over memory; plain torch takes eight
    return ours


def _over(param_groups: list[dict], kind: type[torch.optim.AdamW]) -> torch.optim.Optimizer:
    """A new optimizer over groups whose tensors are shards of buffers: a constructor refuses such views."""
    optimizer = kind([torch.empty(0)])
    for group in param_groups:
        group.update({name: value for name, value in optimizer.defaults.items() if name not in group})
    optimizer.param_groups = param_groups
    return optimizer


def _groups(settings: OptimizerSettings) -> dict[ParamKey, ParamGroupOverride]:
    """megatron-core's description of the parameter groups: decayed, not decayed, and not decayed in fp32.

    The last is a group of its own because the distributed optimizer puts fp32 parameters of a group before bf16 ones
    and then looks them up by their old places (0.16.1, `model_param_group_index_map`): checkpoints would mix them up.
    """
    frozen = ParamPredicate("frozen", lambda param: getattr(param, "frozen", False))
    vector = ParamPredicate("vector", lambda param: param.dim() == 1)
    fp32_vector = ParamPredicate("fp32 vector", lambda param: param.dim() == 1 and param.dtype == torch.float32)
    return {
        ParamKey(predicate=frozen): ParamGroupOverride(wd_mult=0.0),
        ParamKey(predicate=vector): ParamGroupOverride(wd_mult=0.0),
        ParamKey(predicate=fp32_vector): ParamGroupOverride(max_lr=settings.lr),  # any difference makes a group
    }


def freeze(chunks: list[HybridModel], trained: Collection[str]) -> None:
    """Keep parameters of other names as they are: without gradient, moment and decay AdamW changes no bit of them.

    They stay in the optimizer, so that checkpoints are those of any run.
    """
    for chunk in chunks:
        for name, tensor, _ in chunk.table():
            tensor.frozen = name not in trained


def squared_gradient_norm(optimizer: MegatronOptimizer, groups: Groups, device: torch.device) -> Tensor:
    """What this rank adds to the squared L2 norm of the whole gradient, averaged over the global batch's tokens.

    fp32 [], on the device: megatron-core's own norm waits for it, without Transformer Engine once for each parameter.
    """
    optimizer.prepare_grads()
    grads = [grad for part in optimizer.chained_optimizers for grad in part.get_main_grads_for_grad_norm()]
    # Replicas of the distributed optimizer have the same gradients: the first ones speak.
    if not grads or groups.dp_cp.rank() >= groups.collection.intra_dp_cp.size():
        return torch.zeros((), device=device)
    return torch.nn.utils.get_total_norm(grads).square()


def norm_of(squared: Tensor) -> float:
    """The norm, from the sum over ranks of what `squared_gradient_norm` gave; in fp32, as megatron-core adds them."""
    return float(squared.float()) ** 0.5


def update(optimizer: MegatronOptimizer, grad_norm: float, lr: float) -> None:
    """Clip by the global norm and take one step at this learning rate; `squared_gradient_norm` prepared gradients."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = optimizer.config.weight_decay * group["wd_mult"]
    if optimizer.config.clip_grad > 0:
        for part in optimizer.chained_optimizers:
            clip_grads.clip_grad_by_total_norm_fp32(part.get_parameters(), optimizer.config.clip_grad, grad_norm)
    optimizer.step_with_ready_grads()


def finish_parameter_gather(chunks: list[DistributedDataParallel]) -> None:
    """Wait until every parameter is the updated one: overlapped gathering is otherwise finished by the next forward."""
    with gathered_parameters(chunks):
        pass


@contextmanager
def gathered_parameters(chunks: list[DistributedDataParallel]) -> Iterator[None]:
    """Every parameter is the updated one, and calling modules of the model starts no communication of its own."""
    overlapped = [chunk for chunk in chunks if chunk.use_forward_hook]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()


def gather_parameters(chunks: list[DistributedDataParallel]) -> None:
    """Fill the parameter buffers from every rank's own shard, inside `gathered_parameters`."""
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)


def _divide_by_tokens(chunks: list[DistributedDataParallel], num_tokens: Tensor) -> None:
    """As megatron-core does it, but for its question to the device whether there are any."""
    pp, dp_cp = chunks[0].pp_group, chunks[0].dp_cp_group
    dist.broadcast(num_tokens, src=dist.get_global_rank(pp, pp.size() - 1), group=pp)  # the last stage counts them
    dist.all_reduce(num_tokens, group=dp_cp)
    for chunk in chunks:
        chunk.scale_gradients(1.0 / num_tokens.clamp(min=1))


def finalize_gradients(chunks, num_tokens=None, **kwargs) -> None:
    """megatron-core's finalize_model_grads, after summing what it forgets: replicated weights of tensor-parallel heads.

    B and C of a single SSM group are held by every tensor-parallel rank and feed each rank's own heads. megatron-core
    sums the gradients of parameters marked `sequence_parallel` only when sequence parallelism is on (0.16.1,
    distributed/finalize_model_grads.py); these need it always. Goes when upstream has a mark for this case.
    """
    finalize_model_grads(chunks, None, **kwargs)
    if num_tokens is not None:
        _divide_by_tokens(chunks, num_tokens)
    for parameter in (p for chunk in chunks for p in chunk.parameters() if getattr(p, "frozen", False)):
        parameter.main_grad.zero_()
    partial_grads = [p.main_grad for chunk in chunks for p in chunk.parameters() if getattr(p, "sum_over_tp", False)]
    tp = chunks[0].tp_group
    if partial_grads and tp.size() > 1:
        flat = torch.cat([grad.flatten() for grad in partial_grads])
        dist.all_reduce(flat, group=tp)
        for grad, summed in zip(partial_grads, flat.split([g.numel() for g in partial_grads]), strict=True):
            grad.copy_(summed.view_as(grad))
