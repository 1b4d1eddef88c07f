"""What the loop adds to rewards: a punishment of responses that are nearly too long, and the KL to the reference."""

from collections.abc import Sequence
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
    return _with(
        groups, "overlong", [overlong_penalty(len(r.tokens), longest, buffer) for g in groups for r in g.rollouts]
    )


def with_kl(groups: Sequence[RolloutGroup], sums: Sequence[float], beta: float) -> list[RolloutGroup]:
    """The groups with a part `kl` in every valid rollout's rewards: -beta times the response's KL, in their order."""
    return _with(groups, "kl", [-beta * kl for kl in sums])


def _with(groups: Sequence[RolloutGroup], part: str, values: Sequence[float]) -> list[RolloutGroup]:
    """values: of each rollout, group after group."""
    left = iter(values)
    return [
        replace(group, rollouts=tuple(_more(rollout, part, next(left)) for rollout in group.rollouts))
        for group in groups
    ]


def _more(rollout: Rollout, part: str, value: float) -> Rollout:
    return replace(rollout, rewards={**rollout.rewards, part: value}) if rollout.valid else rollout
