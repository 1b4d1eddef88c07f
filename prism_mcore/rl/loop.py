"""The RL run: prompts, rollouts, advantages, reference, update, log, evaluate, save, in that order."""

import logging

from prism_mcore.batch import RolloutGroup
from prism_mcore.exit_codes import DONE, STOPPED_BY_SIGNAL
from prism_mcore.rl import unfinished
from prism_mcore.rl.advantage import has_spread
from prism_mcore.rl.metrics import RLMetrics
from prism_mcore.rl.prompts import Prompts
from prism_mcore.rl.rollout import Interrupted, numbered
from prism_mcore.rl.run import PolicyRun, build, resume, save, with_parity
from prism_mcore.rl.settings import RLSettings
from prism_mcore.rl.update import shaped, update_policy, version
from prism_mcore.train.optimizer import gathered_parameters
from prism_mcore.train.run import carry_out, collection_between_steps, due
from prism_mcore.train.schedule import learning_rate
from prism_mcore.train.signals import SharedSignals

log = logging.getLogger(__name__)


def run(settings: RLSettings, prompts: Prompts) -> int:
    """Improve a policy for `train.steps`, resuming from the newest checkpoint; returns one of exit_codes.py."""
    with_parity(settings)  # refuses what cannot be exact, before anything starts
    return carry_out(
        settings,
        build=lambda groups, device, opened: build(settings, prompts, groups, device, opened),
        train=lambda started: train(started),
    )


def train(run: PolicyRun) -> int:
    """The loop. A signal ends it in the middle of a generation: a step is a pure function of the weights before it."""
    settings, steps = run.settings, run.settings.train.steps
    start = done = saved = resume(run)
    code = DONE
    with (
        RLMetrics(run, start, run.rollouts.clock) as metrics,
        SharedSignals() as signals,
        collection_between_steps() as collect,
    ):
        run.rollouts.stopping = lambda: signals.anywhere
        try:
            if due(start, settings.train.validate_every, steps) and metrics.lacks_validation(start):
                metrics.log_validation(start, held_out_rollouts(run, start))
            for step in range(start + 1, steps + 1):
                metrics.clock.start()
                groups = shaped(run, step, training_rollouts(run, step))
                metrics.write_rollouts(step, groups)  # before anything can stop the step
                lr = learning_rate(step, settings.optimizer, steps)
                updates = update_policy(run, step, groups, lr)
                metrics.log(step, groups, updates, lr, run.tokens)
                done = step

                if due(step, settings.train.validate_every, steps):
                    metrics.log_validation(step, held_out_rollouts(run, step))
                if due(step, settings.checkpoint.every, steps):
                    save(run, step)
                    saved = step
                run.checkpoints.poll()
                collect()
        except Interrupted:
            code = STOPPED_BY_SIGNAL
            if done > saved:
                save(run, done)
            log.info("stopped by a signal after step %d; the same command resumes from here", done)
    run.checkpoints.wait()
    return code


def training_rollouts(run: PolicyRun, step: int) -> list[RolloutGroup]:
    """The step's groups, on every rank: a pure function of (seed, step, weights, prompts asked, unfinished rollouts).

    Under a token budget those of which every rollout is done, be it of earlier steps' prompts; the others are carried.
    Under dynamic sampling the first so many with spread, of as many draws of prompts as it takes, or may.
    """
    rl, asked = run.settings.rl, run.asked
    groups: list[RolloutGroup] = []
    for draw in range(max(1, rl.dynamic_sampling)):
        prompts = run.prompts.training.following(asked, rl.prompts_per_step)
        with gathered_parameters(run.chunks):
            groups += run.rollouts.generate(
                prompts,
                run.settings.sampling,
                step=step,
                version=version(run.settings, step),
                unfinished=run.unfinished,
                budget=rl.token_budget,
                first_sample=draw * run.settings.sampling.samples,
            )
        asked += len(prompts)
        if sum(map(has_spread, groups)) >= rl.prompts_per_step:
            break
    done, run.unfinished = unfinished.part(groups)
    run.asked, run.drawn = asked, len(done)
    return numbered([g for g in done if has_spread(g)][: rl.prompts_per_step] if rl.dynamic_sampling else done)


def held_out_rollouts(run: PolicyRun, step: int) -> list[RolloutGroup]:
    """Answers to the held-out prompts, with the same uniform numbers after every step; none without such prompts."""
    if run.prompts.held_out is None:
        return []
    rl = run.settings.rl
    sampling = run.settings.sampling.model_copy(update={"samples": rl.held_out_samples})
    with gathered_parameters(run.chunks):
        return run.rollouts.generate(
            run.prompts.held_out.first(rl.held_out_prompts),
            sampling,
            step=0,  # training's steps count from 1
            version=version(run.settings, step + 1),
        )
