"""How a run is named, stepped, optimised, saved, watched and logged."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from prism_mcore.checkpoint.settings import CheckpointSettings
from prism_mcore.config import ProgramSettings, Section
from prism_mcore.data.settings import DataSettings
from prism_mcore.model.settings import KernelSettings, ModelSettings, PrecisionSettings, RecomputeType
from prism_mcore.parallel import ParallelSettings, data_parallel_size


class RunSettings(Section):
    """What the run is called and where it lives."""

    name: str = Field(default="", description="Name of the run; empty takes the recipe's file name")
    dir: str = Field(default="runs", description="Folder of all runs; this one lives in <dir>/<name>/")
    seed: int = Field(default=0, ge=0, description="Seed of the initial weights and of the order of the data")
    deterministic: bool = Field(
        default=False, description="On GPUs choose only operations that give the same bits every time; costs speed"
    )


class StepSettings(Section):
    """Steps, forward passes and evaluation."""

    steps: int = Field(default=1000, ge=1, description="Optimizer steps of the whole run")
    micro_batch: int = Field(default=1, ge=1, description="Sequences per forward pass of one data-parallel rank")
    recompute: list[RecomputeType] = Field(
        default=[],
        description="Types of sub-layers whose activations are computed again in the backward pass instead of kept;"
        " [mamba, attention, mlp] is full recompute",
    )
    validate_every: int = Field(
        default=0, ge=0, description="Steps between validations; one at the end in any case; 0 is only that one"
    )


class TrainSettings(StepSettings):
    """Steps, batches and validation."""

    global_batch: int = Field(default=8, ge=1, description="Sequences per step, over all ranks")
    only: list[str] = Field(
        default=[],
        description="Parameters to train, the others stay as they are: types of sub-layers (attention), or patterns of"
        " names (layers.*.mixer.qkv.*); empty trains all",
    )
    validate_batches: int = Field(default=8, ge=1, description="Global batches of each domain in one validation")


class OptimizerSettings(Section):
    """AdamW with fp32 moments; no weight decay on norms, biases, A_log, D and dt_bias."""

    lr: float = Field(default=1e-4, gt=0, description="Peak learning rate")
    schedule: Literal["cosine", "linear", "exponential", "constant", "wsd"] = Field(
        default="cosine",
        description="From lr after the warm-up to lr*min_lr_ratio at the last step;"
        " wsd holds lr and decays linearly in the last decay_fraction of the steps",
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="Steps in which the learning rate rises linearly from 0 to lr"
    )
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1, description="Floor of the schedule as a share of lr")
    decay_fraction: float = Field(default=0.2, ge=0, le=1, description="Share of all steps in which wsd decays")
    weight_decay: float = Field(default=0.1, ge=0, description="Decoupled weight decay of matrices and embeddings")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), description="Decay rates of Adam's first and second moment"
    )
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of the second moment")
    clip_grad: float = Field(default=1.0, ge=0, description="Largest L2 norm of the whole gradient; 0 is no clipping")
    grad_reduce: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Format in which data-parallel ranks send each other gradients; they are summed in fp32 in either,"
        " but bf16 rounds each rank's, so that layouts differ by that",
    )
    masters: Literal["fp32", "remainder"] = Field(
        default="fp32",
        description="How fp32 masters of bf16 weights are kept: whole, or as 16 bits beside the weight, which lose"
        " nothing and save 2 bytes a parameter over the ranks that share the optimizer's state",
    )
    bucket_size: int = Field(
        default=0,
        ge=0,
        description="Parameters whose gradients are reduced at once, while backward goes on; 0 is 40 million, or a"
        " million for each data-parallel rank where that is more",
    )


class GuardSettings(Section):
    """When a bad step is skipped, and when the run is stopped (exit code 76). NaN and Inf are always bad."""

    spike_threshold: float = Field(
        default=0.0,
        ge=0,
        description="A loss above this many times the median of the window is bad; 0 is no such check",
    )
    spike_window: int = Field(
        default=64, ge=2, description="Last good steps whose median loss is the yardstick for spikes"
    )
    skip_budget: int = Field(
        default=0, ge=0, description="Bad steps that may be skipped in the whole run; one more stops it"
    )


class LogSettings(Section):
    """What is written where; metrics.jsonl has every step in any case."""

    every: int = Field(default=1, ge=1, description="Steps between console lines")
    tensorboard: bool = Field(default=True, description="Write tensorboard files into the run's folder")
    wandb: str = Field(
        default="", description="Weights & Biases project that gets the same records; its own variables say how"
    )
    trackio: str = Field(default="", description="Trackio project that gets the same records")


class LoopSettings(ProgramSettings):
    """What mid-training and RL both read."""

    takes_recipe_name: ClassVar[str] = "run.name"

    run: RunSettings = RunSettings()
    model: ModelSettings = ModelSettings()
    parallel: ParallelSettings = ParallelSettings()
    train: StepSettings = StepSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    precision: PrecisionSettings = PrecisionSettings()
    kernels: KernelSettings = Field(default_factory=dict)
    checkpoint: CheckpointSettings = CheckpointSettings()
    guards: GuardSettings = GuardSettings()
    log: LogSettings = LogSettings()

    @property
    def run_dir(self) -> Path:
        """Where this run lives."""
        return Path(self.run.dir) / self.run.name


class MidtrainSettings(LoopSettings):
    """All settings of mid-training."""

    program: ClassVar[str] = "launch/midtrain.py"

    train: TrainSettings = TrainSettings()
    data: DataSettings = DataSettings()

    def num_micro_batches(self, world_size: int) -> int:
        """Forward passes of one data-parallel rank in a step; needs checked settings."""
        return self.train.global_batch // (self.train.micro_batch * data_parallel_size(self.parallel, world_size))
