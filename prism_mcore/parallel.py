"""How many ranks share the work, and in which way."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from prism_mcore.config import Section

if TYPE_CHECKING:  # reading settings must not cost the seconds that importing torch and megatron-core takes
    import torch.distributed as dist


class ParallelSettings(Section):
    """The degrees of each kind of parallelism; data parallelism takes the ranks that are left."""

    tp: int = Field(default=1, ge=1, description="Tensor parallel ranks: every weight matrix is sharded over this many")
    pp: int = Field(default=1, ge=1, description="Pipeline stages: the sub-layers are dealt out over this many ranks")
    vpp: int = Field(
        default=1, ge=1, description="Virtual stages (model chunks) per pipeline rank; above 1 is interleaved 1F1B"
    )
    cp: int = Field(default=1, ge=1, description="Context parallel ranks: every sequence is sharded over this many")
    sequence_parallel: bool = Field(
        default=False,
        description="Shard the activations between tensor-parallel regions along the sequence (needs tp > 1)",
    )
    split: Literal["auto"] | list[int] = Field(
        default="auto",
        description="Sub-layers per pipeline chunk in model order, pp*vpp numbers (chunk k is on stage k % pp);"
        " auto minimises the slowest chunk by FLOPs",
    )
    optimizer_instances: int = Field(
        default=1,
        ge=1,
        description="Replicas of the distributed optimizer: its state is sharded over data-parallel ranks / this many"
        " (the paper's shard 8 x replicate 16 on 128 GPUs is 16)",
    )
    timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="A rank for which others wait so long ends the run: it hangs. Nothing between two exchanges may"
        " take longer",
    )

    @property
    def timeout(self) -> timedelta:
        """The same, of one collective."""
        return timedelta(seconds=self.timeout_s)


@dataclass(frozen=True)
class Groups:
    """This rank's process groups and its place in each; rank 3 of 4 with tp=2, pp=2:

    tp_size 2  tp_rank 1    pp_size 2  pp_rank 1    dp_size 1  dp_rank 0    cp_size 1  cp_rank 0    vpp 1
    is_first_stage False    is_last_stage True
    """

    tp: dist.ProcessGroup  # tensor parallel
    pp: dist.ProcessGroup  # pipeline stages of one replica
    dp: dist.ProcessGroup  # ranks with the same weights and other samples
    cp: dist.ProcessGroup  # context parallel
    dp_cp: dist.ProcessGroup  # what gradients are reduced over
    mp: dist.ProcessGroup  # tp x pp: the ranks that hold one replica
    tp_dp_cp: dist.ProcessGroup  # all ranks of this pipeline stage
    embd: dist.ProcessGroup | None  # first and last stage, which share a tied embedding; None on the stages between
    collection: Any  # the same and more as megatron-core's ProcessGroupCollection, for its modules and optimizer
    tp_size: int
    tp_rank: int
    pp_size: int
    pp_rank: int
    dp_size: int
    dp_rank: int
    cp_size: int
    cp_rank: int
    vpp: int  # model chunks per pipeline rank
    world_size: int
    rank: int

    @property
    def is_first_stage(self) -> bool:
        """Does this rank hold the embedding (in its first chunk)?"""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Does this rank hold the head and compute the loss (in its last chunk)?"""
        return self.pp_rank == self.pp_size - 1


def data_parallel_size(settings: ParallelSettings, world_size: int) -> int:
    """Data-parallel ranks of `world_size`; a ValueError where the degrees do not divide it."""
    model_ranks = settings.tp * settings.pp * settings.cp
    if world_size % model_ranks:
        raise ValueError(
            f"{world_size} ranks cannot be divided into parallel.tp={settings.tp} x pp={settings.pp} x cp={settings.cp}"
            f" = {model_ranks}; start a multiple of {model_ranks} ranks"
        )
    dp = world_size // model_ranks
    if dp * settings.cp % settings.optimizer_instances:
        raise ValueError(
            f"parallel.optimizer_instances={settings.optimizer_instances} does not divide the {dp * settings.cp}"
            " data-parallel ranks; choose a divisor"
        )
    return dp


def init_groups(settings: ParallelSettings, seed: int = 0, timeout: timedelta | None = None) -> Groups:
    """Make every process group and seed megatron-core's random number trackers; every rank calls it.

    Ranks are laid out tp fastest, then cp, dp, pp, so that tensor parallelism stays inside a node. `platform.start()`
    comes first. seed: the data-parallel generator gets `seed`, the tensor-parallel one a number of its own per tp rank.
    timeout: of one collective; settings.timeout by default.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    data_parallel_size(settings, dist.get_world_size())
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=settings.tp,
        pipeline_model_parallel_size=settings.pp,
        virtual_pipeline_model_parallel_size=settings.vpp if settings.vpp > 1 else None,
        context_parallel_size=settings.cp,
        num_distributed_optimizer_instances=settings.optimizer_instances,
        # Our groups are passed on, which megatron-core's optimizer does not combine with a second, gloo set.
        create_gloo_process_groups=False,
        distributed_timeout_minutes=(timeout or settings.timeout).total_seconds() / 60,
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    return Groups(
        tp=collection.tp,
        pp=collection.pp,
        dp=collection.dp,
        cp=collection.cp,
        dp_cp=collection.dp_cp,
        mp=collection.mp,
        tp_dp_cp=collection.tp_dp_cp,
        embd=collection.embd,
        collection=collection,
        tp_size=collection.tp.size(),
        tp_rank=collection.tp.rank(),
        pp_size=collection.pp.size(),
        pp_rank=collection.pp.rank(),
        dp_size=collection.dp.size(),
        dp_rank=collection.dp.rank(),
        cp_size=collection.cp.size(),
        cp_rank=collection.cp.rank(),
        vpp=settings.vpp,
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
    )


def destroy_groups() -> None:
    """Destroy what `init_groups` made, so that the same processes can form another layout; every rank calls it."""
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    world = dist.group.WORLD
    made = [group for group in list(dist.distributed_c10d._world.pg_map) if group is not world]
    mpu.destroy_model_parallel()
    unset_num_microbatches_calculator()
    for group in made:
        dist.destroy_process_group(group)
