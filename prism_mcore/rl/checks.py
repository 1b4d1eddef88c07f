"""Can these settings work? RL's check; pure, before any process group."""

from prism_mcore.config import Findings
from prism_mcore.generate.checks import check_fp8_of_tokens, check_stop_ids
from prism_mcore.model.checks import check_one_stage, check_positions, nearest_multiples
from prism_mcore.model.spec import ModelSpec
from prism_mcore.rl.settings import RLSettings
from prism_mcore.train.checks import check_loop


def check(settings: RLSettings, spec: ModelSpec, world_size: int) -> list[str]:
    """Check the whole of the settings against the model and the number of ranks.

    Returns notes on what is worth knowing. Raises one SettingsError that lists every problem, as train/checks.py does.
    """
    found = Findings()
    check_loop(settings, spec, world_size, found)
    check_one_stage(settings.parallel, spec, found)
    _check_context(settings, spec, found)
    _check_rollouts(settings, found)
    _check_fp8(settings, found)
    _check_reference(settings, found)
    check_stop_ids(settings.sampling, spec, found)
    return found.conclude()


def _check_context(settings: RLSettings, spec: ModelSpec, found: Findings) -> None:
    context, longest = settings.rl.context, settings.sampling.max_tokens
    if longest >= context:
        found.problems.append(
            f"sampling.max_tokens={longest} leaves no room for a prompt in rl.context={context}; lower the one or raise"
            " the other"
        )
    check_positions("rl.context", context, spec, found)


def _check_fp8(settings: RLSettings, found: Findings) -> None:
    fp8 = settings.precision.fp8
    check_fp8_of_tokens(settings.precision, found)
    if fp8 == "blockwise" and settings.rl.parity == "exact":
        found.problems.append(
            "rl.parity=exact and precision.fp8=blockwise: exact promises the bits of the model's own precision; use"
            " rl.parity=tolerance, which measures the gap, or precision.fp8=off"
        )


def _check_reference(settings: RLSettings, found: Findings) -> None:
    if settings.rl.kl_coefficient and settings.optimizer.masters == "remainder":
        found.problems.append(
            f"rl.kl_coefficient={settings.rl.kl_coefficient} and optimizer.masters=remainder: the reference is scored"
            " in the model's own buffers, which then hold half of every master; use optimizer.masters=fp32"
        )


def _check_rollouts(settings: RLSettings, found: Findings) -> None:
    rl, sampling, problems, notes = settings.rl, settings.sampling, found.problems, found.notes
    if not rl.prompts:
        problems.append("rl.prompts is empty; give at least one {path, weight, name}")
    elif sum(source.weight for source in rl.prompts) <= 0:
        problems.append(f"rl.prompts: all {len(rl.prompts)} weights are 0; at least one must be positive")
    if sampling.samples < 2:
        problems.append(f"sampling.samples={sampling.samples}: a group needs at least 2 to compare; the paper has 16")
    if sampling.temperature == 0:
        problems.append("sampling.temperature=0 gives a group of equal rollouts; use 1.0")
    if rl.token_budget and rl.dynamic_sampling:
        problems.append(
            f"rl.token_budget={rl.token_budget} and rl.dynamic_sampling={rl.dynamic_sampling}: drawing until enough"
            " groups are done would wait for the long responses that the budget is there to leave; set one of them to 0"
        )
    if rl.drop_zero_spread and ((rl.kl_in == "reward" and rl.kl_coefficient) or rl.overlong == "soft"):
        notes.append(
            "rl.drop_zero_spread: what rl.kl_in=reward and rl.overlong=soft add to rewards makes them differ in groups"
            " that are all right or all wrong, too; few are left out"
        )
    if rl.dynamic_sampling and rl.updates > 1:
        problems.append(
            f"rl.dynamic_sampling={rl.dynamic_sampling} and rl.updates={rl.updates}: draws may end with fewer groups"
            " than can be dealt over several updates; set rl.updates=1"
        )
    if 0 < rl.dual_clip <= 1:
        problems.append(f"rl.dual_clip={rl.dual_clip}: needed: more than 1, or 0 for none")
    if rl.dual_clip and rl.clip != "ppo":
        problems.append(f"rl.dual_clip={rl.dual_clip} bounds rl.clip=ppo; rl.clip={rl.clip} has no minimum to bound")
    if rl.overlong == "soft" and rl.overlong_buffer > sampling.max_tokens:
        problems.append(
            f"rl.overlong_buffer={rl.overlong_buffer} is longer than sampling.max_tokens={sampling.max_tokens}:"
            " lower it"
        )
    if rl.kl_in == "reward" and rl.kl_coefficient and rl.kl != "k1":
        notes.append(f"rl.kl={rl.kl} in the reward is biased; its sources take k1 there")
    if rl.kl_in == "reward" and rl.kl_coefficient and rl.advantage == "grpo":
        notes.append(
            "rl.kl_in=reward and rl.advantage=grpo: where a group's rewards are equal, its advantages are the KL over"
            " its own standard deviation, however small that is; the sources take rloo or reinforce_pp"
        )
    if rl.token_budget and rl.updates > 1:
        problems.append(
            f"rl.token_budget={rl.token_budget} and rl.updates={rl.updates}: nobody knows before how many groups a step"
            " finishes, so they cannot be dealt over several updates; set rl.updates=1"
        )
    if rl.token_budget >= sampling.max_tokens:
        notes.append(
            f"rl.token_budget={rl.token_budget} changes nothing: no rollout has more than sampling.max_tokens="
            f"{sampling.max_tokens}"
        )
    if rl.share_prompts and rl.parity == "exact":
        problems.append(
            "rl.share_prompts and rl.parity=exact: a scan that goes on from a prompt's end has another grid of chunks"
            " than the sampler's, and other bits; leave rl.share_prompts out, or choose rl.parity=tolerance"
        )
    if rl.prompts_per_step % rl.updates:
        problems.append(
            f"rl.prompts_per_step={rl.prompts_per_step} cannot be dealt over rl.updates={rl.updates};"
            f" {nearest_multiples(rl.prompts_per_step, rl.updates)}"
        )
    if settings.guards.spike_threshold:
        problems.append(
            f"guards.spike_threshold={settings.guards.spike_threshold}: a policy loss lies around 0, so that no"
            " multiple of it is a spike; set it to 0"
        )
    if sampling.seed:
        notes.append(f"sampling.seed={sampling.seed} changes nothing: rollouts are drawn by run.seed")
    if sampling.top_k or sampling.top_p < 1:
        notes.append("sampling.top_k and top_p: log-probs are those before them, so the policy gradient is biased")
    if rl.reference_every and not rl.kl_coefficient:
        notes.append("rl.reference_every changes nothing: without rl.kl_coefficient there is no reference")
