"""What the loop adds to rewards: a punishment of responses that are nearly too long, and the KL to the reference."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from prism_mcore.batch import Rollout, RolloutGroup


def is_cut(rollout: Rollout) -> bool:
    """Did the response end because it had no more room?"""
    return rollout.finish in ("length", "context")


def overlong_penalty(length: int, longest: int, buffer: int) -> float:
    """0 up to longest - buffer tokens, then falling to -1 at longest. Source: DAPO, arXiv 2503.14476, equation 13."""
    return -max(0.0, min(1.0, (length - (longest - buffer)) / buffer))


def with_overlong_penalty(groups: Sequence[RolloutGroup], longest: int, buffer: int) -> list[RolloutGroup]:
    """The groups with a part `overlong` in every valid rollout's rewards."""
    return [_with(group, "overlong", lambda r: overlong_penalty(len(r.tokens), longest, buffer)) for group in groups]


def with_kl(groups: Sequence[RolloutGroup], sums: Sequence[float], beta: float) -> list[RolloutGroup]:
    """The groups with a part `kl` in every valid rollout's rewards: -beta times the response's KL, in their order."""
    of_rollout = {id(rollout): kl for rollout, kl in zip((r for g in groups for r in g.rollouts), sums, strict=True)}
    return [_with(group, "kl", lambda r: -beta * of_rollout[id(r)]) for group in groups]


def _with(group: RolloutGroup, part: str, value: Callable[[Rollout], float]) -> RolloutGroup:
    rollouts = [
        replace(rollout, rewards={**rollout.rewards, part: value(rollout)}) if rollout.valid else rollout
        for rollout in group.rollouts
    ]
    return replace(group, rollouts=tuple(rollouts))
