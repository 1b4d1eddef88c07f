"""The loss of a policy update, token by token, each piece a few lines with its formula and source.

    loss = sum_it weight_it * ( -c_it * min(r_it A_i, clip(r_it, 1 - clip_low, 1 + clip_high) A_i) + beta * kl_it )

    r_it     pi(token) / pi_old(token)
    c_it     min(pi_old(token) / sampler(token), tis_cap), not differentiated
    kl_it    estimate of KL(pi || reference) at this token
    weight   1 / denominator, see aggregation.py

No pass computes pi_old. Where the weights that sampled a token are still the weights (the first update of a step),
pi_old is pi without its gradient: r = 1, its gradient is that of log pi, and c corrects what the sampler's arithmetic
did differently (nothing at all under rl.parity=exact). After that, pi_old is the sampler's own value, and c = 1.
"""

# t packed tokens of a micro-batch; all tensors [t] fp32 unless said otherwise

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_mcore.batch import PolicyBatch
from prism_mcore.rl.settings import PolicySettings


def surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A): PPO's, arXiv 1707.06347, equation 7.

    Equal bounds are PPO's and GRPO's; clip_high > clip_low is DAPO's clip-higher, arXiv 2503.14476, equation 10.
    """
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def correction(logprobs: Tensor, sampled: Tensor, on_policy: Tensor, cap: float) -> Tensor:
    """min(pi_old / sampler, cap) where pi_old is pi (on_policy [t] bool), else 1; 1 everywhere where cap is 0.

    Truncated importance sampling between two engines; PRISM caps it at 2. Source: Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training".
    """
    if not cap:
        return torch.ones_like(sampled)
    return torch.where(on_policy, (logprobs.detach() - sampled).exp().clamp(max=cap), 1.0)


# KL(pi || reference) from one token of pi, d = log pi - log reference: Schulman 2020, "Approximating KL divergence".
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
LARGEST_DIFFERENCE = 40.0  # nats: beyond it e^-d of an unlucky token would drown every other


@dataclass(frozen=True)
class LossTerms:
    """What the loss of a micro-batch was made of, without gradients; only the tokens of loss_mask mean anything."""

    loss: Tensor  # weighted
    kl: Tensor  # of the estimator in use, unweighted; zeros without a reference
    gap: Tensor  # |log pi - log sampler| where the token is on-policy, else 0
    clipped_low: Tensor  # bool: the lower bound cut the gradient
    clipped_high: Tensor  # bool: the upper bound did
    ratio: Tensor
    correction: Tensor


def policy_loss(logprobs: Tensor, batch: PolicyBatch, settings: PolicySettings) -> tuple[Tensor, LossTerms]:
    """The micro-batch's part of the loss (a sum), and its pieces; logprobs [t] are differentiable."""
    advantages, sampled = batch.advantages.flatten(), batch.sampler_logprobs.flatten()
    on_policy, weights = batch.on_policy.flatten(), batch.weights.flatten()
    now = logprobs.detach()
    ratio = (logprobs - torch.where(on_policy, now, sampled)).exp()
    importance = correction(now, sampled, on_policy, settings.tis_cap)
    loss = -importance * surrogate(ratio, advantages, settings.clip_low, settings.clip_high)
    kl = torch.zeros_like(now)
    if batch.reference_logprobs is not None:
        difference = logprobs - batch.reference_logprobs.flatten()
        kl = KL[settings.kl](difference.clamp(-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE))
        loss = loss + settings.kl_coefficient * kl
    loss = loss * weights
    fixed = ratio.detach()
    return loss.sum(), LossTerms(
        loss=loss.detach(),
        kl=kl.detach(),
        gap=torch.where(on_policy, (now - sampled).abs(), 0.0),
        clipped_low=(advantages < 0) & (fixed < 1 - settings.clip_low),
        clipped_high=(advantages > 0) & (fixed > 1 + settings.clip_high),
        ratio=fixed,
        correction=importance,
    )
