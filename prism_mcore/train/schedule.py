"""Learning-rate schedules: pure functions of the step, so that resuming needs no state."""

import math
from collections.abc import Callable

from prism_mcore.train.settings import OptimizerSettings

# Each maps progress through the decay in [0, 1] to the share of the way from the floor up to the peak.
EXPONENTIAL_RATE = 5.0  # exp(-5 x), shifted and scaled to run from 1 to exactly 0 (the form lm-engine uses)
DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 1.0,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "linear": lambda x: 1 - x,
    "exponential": lambda x: (
        (math.exp(-EXPONENTIAL_RATE * x) - math.exp(-EXPONENTIAL_RATE)) / (1 - math.exp(-EXPONENTIAL_RATE))
    ),
    "wsd": lambda x: 1 - x,
}


def learning_rate(step: int, settings: OptimizerSettings, steps: int) -> float:
    """The learning rate of update number `step`, counted from 1, of `steps`.

    Linear warm-up reaches the peak at `warmup_steps`; the decay reaches `min_lr_ratio * lr` at the last step. "wsd"
    stays at the peak until its last `decay_fraction` of the steps and falls linearly there.
    """
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    start = settings.warmup_steps
    if settings.schedule == "wsd":
        start = max(start, steps - round(settings.decay_fraction * steps))
    progress = min(max((step - start) / max(steps - start, 1), 0.0), 1.0)
    floor = settings.min_lr_ratio * settings.lr
    return floor + (settings.lr - floor) * DECAYS[settings.schedule](progress)
