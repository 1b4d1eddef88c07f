"""The loss of a policy update, token by token, each piece a few lines with its formula and source.

    loss = sum_it weight_it * ( -c_it * surrogate(r_it, A_i) + beta * kl_it - eta * entropy_it )

    r_it     pi(token) / pi_old(token), or one ratio for the whole response            `rl.ratio`
    surrogate  min(r A, clip(r) A) or another                                           `rl.clip`
    c_it     pi_old(token) / sampler(token), bounded or masked, not differentiated      `rl.correction`
    kl_it    estimate of KL(pi || reference) at this token, where it is in the loss     `rl.kl`, `rl.kl_in`
    weight   1 / denominator, see aggregation.py                                        `rl.aggregation`

No pass computes pi_old. Where the weights that sampled a token are still the weights (the first update of a step),
pi_old is pi without its gradient: r = 1, its gradient is that of log pi, and c corrects what the sampler's arithmetic
did differently (nothing at all under rl.parity=exact). After that, pi_old is the sampler's own value, and c = 1.
"""

# t packed tokens of a micro-batch, D documents in it; all tensors [t] fp32 unless said otherwise

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_mcore.batch import PolicyBatch
from prism_mcore.rl.settings import PolicySettings

LARGEST_DIFFERENCE = 40.0  # nats: beyond it e^-d of an unlucky token would drown every other


# --- the ratio --------------------------------------------------------------------------------------------------------


def token_ratio(log_ratio: Tensor, responses: "Responses") -> Tensor:
    """pi(token) / pi_old(token). Source: PPO, arXiv 1707.06347."""
    return log_ratio.exp()


def sequence_ratio(log_ratio: Tensor, responses: "Responses") -> Tensor:
    """(pi(response) / pi_old(response))^(1 / length), the same at each token. Source: GSPO, arXiv 2507.18071, eq. 7."""
    return responses.mean(log_ratio, responses.mask).exp()


RATIOS: dict[str, Callable[[Tensor, "Responses"], Tensor]] = {"token": token_ratio, "sequence": sequence_ratio}


@dataclass(frozen=True)
class Responses:
    """Which tokens make up each response of a micro-batch."""

    mask: Tensor  # [t] bool: is the label a response token in the loss?
    on_policy: Tensor  # [t] bool: sampled with the weights that the update starts from
    documents: Tensor  # [t] int64
    count: int  # D

    def mean(self, values: Tensor, counted: Tensor) -> Tensor:
        """[t] -> [t]: the mean over those `counted` [t] of the response that each token belongs to; 0 without any."""
        sums = values.new_zeros(self.count).index_add(0, self.documents, torch.where(counted, values, 0.0))
        lengths = values.new_zeros(self.count).index_add(0, self.documents, counted.to(values.dtype))
        return (sums / lengths.clamp(min=1)).index_select(0, self.documents)


# --- the surrogate ----------------------------------------------------------------------------------------------------


def ppo(ratio: Tensor, logprobs: Tensor, advantages: Tensor, settings: PolicySettings) -> Tensor:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A): PPO's, arXiv 1707.06347, equation 7.

    Equal bounds are PPO's and GRPO's; clip_high > clip_low is DAPO's clip-higher, arXiv 2503.14476, equation 10. With
    dual_clip c it is at least c A where A < 0: arXiv 1912.09729, equation 5.
    """
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    if not settings.dual_clip:
        return surrogate
    return torch.where(advantages < 0, torch.maximum(surrogate, settings.dual_clip * advantages), surrogate)


def cispo(ratio: Tensor, logprobs: Tensor, advantages: Tensor, settings: PolicySettings) -> Tensor:
    """clip(r, 1 - clip_low, 1 + clip_high) A log pi, the clipped ratio not differentiated: no token loses its gradient.

    Source: CISPO in MiniMax-M1, arXiv 2506.13585, equations 4 and 5.
    """
    return ratio.detach().clamp(1 - settings.clip_low, 1 + settings.clip_high) * advantages * logprobs


def unclipped(ratio: Tensor, logprobs: Tensor, advantages: Tensor, settings: PolicySettings) -> Tensor:
    """r A: the plain policy gradient, weighted by importance where it is off-policy."""
    return ratio * advantages


CLIPS: dict[str, Callable[[Tensor, Tensor, Tensor, PolicySettings], Tensor]] = {
    "ppo": ppo,
    "cispo": cispo,
    "none": unclipped,
}


# --- the correction between sampler and training ----------------------------------------------------------------------


def truncate(weights: Tensor, responses: Responses, settings: PolicySettings) -> Tensor:
    """min(c, tis_cap), or 1 where tis_cap is 0: truncated importance sampling between two engines; PRISM caps it at 2.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
    """
    if not settings.tis_cap:
        return torch.ones_like(weights)
    return torch.where(responses.on_policy, weights.clamp(max=settings.tis_cap), weights)


def icepop(weights: Tensor, responses: Responses, settings: PolicySettings) -> Tensor:
    """c where it lies in [mask_low, mask_high], else 0: tokens on which the two disagree teach nothing.

    Source: IcePop in Ring-1T, arXiv 2510.18855, with 0.5 and 5.
    """
    inside = (weights >= settings.mask_low) & (weights <= settings.mask_high)
    return torch.where(inside, weights, 0.0)


def sequence_mask(weights: Tensor, responses: Responses, settings: PolicySettings) -> Tensor:
    """`truncate`, and 0 for whole responses whose geometric mean of c lies outside of [mask_low, mask_high].

    The mean is of tokens that c is known of: not of those that older weights sampled.
    Source: Liu et al. 2025, "When speed kills stability: demystifying RL collapse from the training-inference
    mismatch".
    """
    mean = responses.mean(weights.log(), responses.mask & responses.on_policy).exp()
    inside = (mean >= settings.mask_low) & (mean <= settings.mask_high)
    return torch.where(inside, truncate(weights, responses, settings), 0.0)


CORRECTIONS: dict[str, Callable[[Tensor, Responses, PolicySettings], Tensor]] = {
    "truncate": truncate,
    "icepop": icepop,
    "sequence": sequence_mask,
}


# --- KL(pi || reference) of one token of pi, d = log pi - log reference: Schulman 2020, "Approximating KL divergence" -
# In a loss their gradients differ: k1's has mean zero (it is only measured by it), k2's is that of the KL itself, k3's,
# (1 - e^-d) grad log pi, is the one GRPO uses.


def k1(d: Tensor) -> Tensor:
    """d: unbiased, of either sign."""
    return d


def k2(d: Tensor) -> Tensor:
    """d^2 / 2: biased, never negative."""
    return d.square() / 2


def k3(d: Tensor) -> Tensor:
    """e^-d - 1 + d: unbiased, never negative."""
    return torch.expm1(-d) + d


KL: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_estimate(logprobs: Tensor, reference: Tensor, kind: str) -> Tensor:
    """KL(pi || reference) at each token, of a difference that is bounded."""
    return KL[kind]((logprobs - reference).clamp(-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE))


# --- the loss ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossTerms:
    """What the loss of a micro-batch was made of, without gradients; only the tokens of loss_mask mean anything."""

    loss: Tensor  # weighted
    ratio: Tensor
    gap: Tensor  # |log pi - log sampler| where the token is on-policy, else 0
    means: dict[str, Tensor]  # by metric: its mean over all tokens in the loss is logged


def policy_loss(
    logprobs: Tensor, entropy: Tensor, batch: PolicyBatch, settings: PolicySettings
) -> tuple[Tensor, LossTerms]:
    """The micro-batch's part of the loss (a sum), and its pieces; logprobs [t] are differentiable, entropy [t] is not.

    The entropy bonus has the gradient -(log pi + entropy) grad log pi, which is that of the entropy for a token of pi:
    an unbiased estimate, with the exact entropy as its baseline.
    """
    assert batch.loss_mask is not None
    advantages, sampled = batch.advantages.flatten(), batch.sampler_logprobs.flatten()
    on_policy, weights = batch.on_policy.flatten(), batch.weights.flatten()
    documents = batch.seq_idx.flatten().long()
    responses = Responses(batch.loss_mask.flatten(), on_policy, documents, len(batch.rollout_ids))
    now = logprobs.detach()
    ratio = RATIOS[settings.ratio](logprobs - torch.where(on_policy, now, sampled), responses)
    importance = torch.where(on_policy, (now - sampled).exp(), 1.0)
    corrected = CORRECTIONS[settings.correction](importance, responses, settings)
    loss = -corrected * CLIPS[settings.clip](ratio, logprobs, advantages, settings)
    kl = torch.zeros_like(now)
    if batch.reference_logprobs is not None:
        kl = kl_estimate(logprobs, batch.reference_logprobs.flatten(), settings.kl)
        loss = loss + settings.kl_coefficient * kl
    if settings.entropy_coefficient:
        loss = loss + settings.entropy_coefficient * (now + entropy) * logprobs
    loss = loss * weights
    fixed, clips = ratio.detach(), settings.clip != "none"
    return loss.sum(), LossTerms(
        loss=loss.detach(),
        ratio=fixed,
        gap=torch.where(on_policy, (now - sampled).abs(), 0.0),
        means={
            "entropy": entropy,
            "kl": kl.detach(),
            "clip/low": clips & (advantages < 0) & (fixed < 1 - settings.clip_low),
            "clip/high": clips & (advantages > 0) & (fixed > 1 + settings.clip_high),
            "importance/mean": corrected,
            "importance/capped": (corrected < importance) & (settings.correction != "truncate" or settings.tis_cap > 0),
            "stale": ~on_policy,
        },
    )
