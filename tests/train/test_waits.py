"""A training step waits for the device once, to decide about its update, and all that ranks tell goes with that."""

from collections import Counter

import pytest
from ranks import run_ranks
from tiny.models import SPECS, packed_batches
from tiny.policies import batches_of, open_policy
from tiny.waits import Waits

from prism_mcore.train.settings import GuardSettings


def step_of_training(groups, folder):
    from prism_mcore.train.guards import Guard
    from prism_mcore.train.optimizer import update
    from prism_mcore.train.step import backward

    chunks, optimizer = open_policy(groups, "hybrid")
    batches = packed_batches(SPECS["hybrid"], 4)[groups.dp_rank :: groups.dp_size]
    guard = Guard(GuardSettings(), folder, groups)
    with Waits(batches) as seen:
        stats = backward(chunks, optimizer, batches, groups, num_sources=2)
        assert guard.admits(1, stats, batches)
        update(optimizer, stats.grad_norm, 1e-3)
    return seen.reads, seen.collectives


def step_of_policy(groups, folder):
    from prism_mcore.rl.settings import PolicySettings
    from prism_mcore.rl.step import policy_backward
    from prism_mcore.train.guards import Guard
    from prism_mcore.train.optimizer import update

    chunks, optimizer = open_policy(groups, "hybrid")
    settings = PolicySettings(kl_coefficient=0.0)
    batches = batches_of(groups, "hybrid", settings)
    guard = Guard(GuardSettings(), folder, groups)
    with Waits(batches) as seen:
        stats = policy_backward(chunks, optimizer, batches, settings, groups)
        assert guard.admits(1, stats, batches)
        update(optimizer, stats.grad_norm, 1e-3)
    return seen.reads, seen.collectives


# Gradients to their owners, the number of tokens that they are divided by (from the last stage, over data-parallel
# ranks), everything that is said of the step, and the weights from their owners.
COLLECTIVES = {
    "reduce_scatter_tensor_coalesced": 1,
    "broadcast": 1,
    "allreduce": 2,
    "allgather_into_tensor_coalesced": 1,
}


@pytest.mark.parametrize("step", [step_of_training, step_of_policy])
def test_a_step_waits_for_the_device_once_and_says_everything_in_one_reduction(step, tmp_path):
    for reads, collectives in run_ranks(2, step, tmp_path):
        assert len(reads) == 1 and reads[0].startswith("cpu in agree.py"), reads
        assert Counter(collectives) == COLLECTIVES
