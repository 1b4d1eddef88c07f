"""How rollouts become updates. The defaults are PRISM's (arXiv 2603.17074, Table 21) where the paper states them."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from prism_mcore.config import Section
from prism_mcore.generate.settings import EngineSettings, Sampling
from prism_mcore.rewards.settings import RewardSettings
from prism_mcore.rl.presets import listed, with_preset
from prism_mcore.train.settings import LoopSettings


class PromptSourceSettings(Section):
    """One prompt file and its share of the mixture."""

    path: str = Field(description="JSONL file with `prompt` or `messages`, `answer` and `reward` on each line")
    weight: float = Field(
        default=1.0, ge=0.0, allow_inf_nan=False, description="Share of the prompts relative to the other sources"
    )
    name: str = Field(default="", description="Name in metrics; empty takes the file's")


class PolicySettings(Section):
    """The RL loop: prompts, advantage, loss, reference policy. Group size and sampling are in `sampling`."""

    former_names: ClassVar[dict[str, str]] = {"eta": "advantage_eps"}

    prompts: list[PromptSourceSettings] = Field(default=[], description="List of {path, weight, name}")
    held_out: list[PromptSourceSettings] = Field(
        default=[], description="Prompt files for evaluation, answered every train.validate_every steps"
    )
    tokenizer: str = Field(
        default="", description="Folder with the model's tokenizer; empty takes the Hugging Face directory model.init"
    )
    context: int = Field(
        default=16384,
        ge=2,
        description="Tokens of the longest prompt and response together; a forward pass packs train.micro_batch times"
        " as many",
    )
    prompts_per_step: int = Field(
        default=64, ge=1, description="Groups of rollouts in a step; each has sampling.samples rollouts"
    )
    token_budget: int = Field(
        default=0,
        ge=0,
        description="Tokens that a rollout may gain in a step; what is unfinished then is carried to the next one, and"
        " continued with its weights. A group is in the loss when all of it is done. 0: no bound",
    )
    updates: int = Field(
        default=1,
        ge=1,
        description="Optimizer updates per step, each on its own part of the groups; 1 is strictly on-policy",
    )
    share_prompts: bool | None = Field(
        default=None,
        description="Compute a group's prompt once in training's forward and backward passes, too; by default so but"
        " under parity=exact, where a rollout has the sampler's bits only as a whole",
    )
    parity: Literal["exact", "tolerance", "off"] = Field(
        default="tolerance",
        description="Log-probs of sampler and training: exact stops the run at a gap of one bit, tolerance at a mean"
        " gap above parity_tolerance, off only measures",
    )
    parity_tolerance: float = Field(
        default=0.05, gt=0, description="Largest mean gap between sampler and training, nats, under parity=tolerance"
    )
    preset: str = Field(default="", description=f"An algorithm, by the switches below that it sets. {listed()}")
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"] = Field(
        default="grpo",
        description="grpo: (r - mean) / (std + advantage_eps) over the group; dr_grpo: r - mean; rloo: r - mean of the"
        " others; reinforce_pp: (r - mean) / std over the step; reinforce_pp_baseline: that of r - the group's mean",
    )
    advantage_eps: float = Field(default=1e-8, ge=0, description="Added to the standard deviation")
    drop_zero_spread: bool = Field(
        default=False,
        description="Leave groups whose rewards are all equal out of the loss and its denominator; else they stay, with"
        " advantage 0, for the KL term",
    )
    aggregation: Literal["group_total", "token_mean", "sequence_mean", "constant"] = Field(
        default="group_total",
        description="Mean over groups of the mean over a group's tokens; over all tokens; over samples of the mean over"
        " a sample's tokens; or over samples of the sum over its tokens, divided by sampling.max_tokens",
    )
    ratio: Literal["token", "sequence"] = Field(
        default="token", description="Of policy and old policy: each token's, or the geometric mean of a response's"
    )
    clip: Literal["ppo", "cispo", "none"] = Field(
        default="ppo",
        description="ppo: min(r A, clipped r A); cispo: clipped r, without its gradient, A log pi; none: r A",
    )
    dual_clip: float = Field(
        default=0.0, ge=0, description="Lower bound of a negative advantage's part, in advantages; above 1, 0 is none"
    )
    clip_low: float = Field(default=0.2, ge=0, le=1, description="The ratio is clipped below 1 - clip_low")
    clip_high: float = Field(
        default=0.2, ge=0, description="The ratio is clipped above 1 + clip_high; more than clip_low is clip-higher"
    )
    correction: Literal["truncate", "icepop", "sequence"] = Field(
        default="truncate",
        description="Importance weight of training's log-probs over the sampler's. truncate: at most tis_cap; icepop: 0"
        " outside of [mask_low, mask_high]; sequence: truncate, and 0 for responses whose geometric mean lies outside",
    )
    tis_cap: float = Field(
        default=2.0,
        ge=0,
        description="Cap of the importance weight that corrects for the sampler's log-probs; 0 is no correction",
    )
    mask_low: float = Field(default=0.5, ge=0, le=1, description="Of the importance weight, see correction")
    mask_high: float = Field(default=5.0, ge=1, description="Of the importance weight, see correction")
    entropy_coefficient: float = Field(default=0.0, ge=0, description="Times the policy's entropy, taken off the loss")
    overlong: Literal["keep", "mask", "soft"] = Field(
        default="keep",
        description="Responses cut at sampling.max_tokens. mask: they count for their group's mean, not in the loss;"
        " soft: from overlong_buffer tokens before the end on, a reward of 0 to -1 is added",
    )
    overlong_buffer: int = Field(default=4096, ge=1, description="Tokens, see overlong=soft")
    dynamic_sampling: int = Field(
        default=0,
        ge=0,
        description="Groups without spread are replaced by those of more prompts, drawn at most so many times a step;"
        " 0 takes what the first have",
    )
    kl_coefficient: float = Field(
        default=0.05, ge=0, description="Times the KL to the reference policy; 0 keeps no reference"
    )
    kl_in: Literal["loss", "reward"] = Field(
        default="loss", description="Where the KL is: in the loss of each token, or its sum taken off the reward"
    )
    kl: Literal["k1", "k2", "k3"] = Field(default="k3", description="Estimator of the KL to the reference policy")
    reference_every: int = Field(
        default=0, ge=0, description="Steps between soft updates of the reference policy; 0 never updates it"
    )
    reference_alpha: float = Field(
        default=0.6, ge=0, le=1, description="Soft update: reference = alpha * policy + (1 - alpha) * reference"
    )
    on_change: Literal["refuse", "continue"] = Field(
        default="refuse",
        description="Where the prompts are not what the run was trained on so far: refuse to resume, or continue, each"
        " file from its own number of prompts",
    )
    held_out_prompts: int = Field(default=128, ge=1, description="The first so many of the held-out prompts are used")
    held_out_samples: int = Field(default=1, ge=1, description="Samples of each held-out prompt")
    show: int = Field(default=3, ge=0, description="Rollouts shown on the console every log.every steps")

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: Any) -> Any:
        return with_preset(given) if isinstance(given, dict) else given


class RLSettings(LoopSettings):
    """All settings of RL."""

    program: ClassVar[str] = "launch/rl.py"

    rl: PolicySettings = PolicySettings()
    rewards: RewardSettings = RewardSettings()
    sampling: Sampling = Sampling()
    generate: EngineSettings = EngineSettings()
