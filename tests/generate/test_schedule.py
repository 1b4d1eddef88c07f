"""The schedule: no block or slot has two owners that should not share it, none is lost, nothing is ever interrupted."""

import numpy as np
import pytest

from prism_mcore.generate.replica import BLOCK_LEN, SPARE, Capacity
from prism_mcore.generate.requests import Request
from prism_mcore.generate.schedule import Schedule, blocks_needed


def random_case(rng):
    requests = [
        Request(tuple(range(rng.integers(1, 200))), tuple((0, 0, i, s) for s in range(rng.integers(1, 9))))
        for i in range(rng.integers(1, 12))
    ]
    limits = rng.integers(1, 150, len(requests))
    longest = int(blocks_needed(np.array([len(r.tokens) for r in requests]), limits).max())
    room = Capacity(int(rng.integers(1, 9)), longest + int(rng.integers(0, 12)))
    return requests, limits, Schedule(requests, limits, room, prefill_tokens=256)


def check_owners(schedule):
    """Every block is owned as often as it is listed; the one that a sample writes to next is its own."""
    owners = np.zeros_like(schedule.blocks.owners)
    owners[schedule.scratch_block] += 1
    running = np.flatnonzero(schedule.active)
    for slot in running:
        owners[schedule.block_table[slot, : schedule.num_blocks[slot]]] += 1
    if schedule.held is not None:
        owners[np.concatenate([schedule.held.full, schedule.held.part])] += 1
    assert (owners == schedule.blocks.owners).all()
    last = [schedule.block_table[slot, schedule.num_blocks[slot] - 1] for slot in running]
    partial = schedule.length[running] % BLOCK_LEN > 0
    assert (schedule.blocks.owners[np.array(last, int)[partial]] == 1).all()


@pytest.mark.parametrize("seed", range(30))
def test_every_sample_runs_to_its_end_in_blocks_of_its_own(seed):
    """Lengths are random up to the limits, memory is barely enough for the longest sample."""
    rng = np.random.default_rng(seed)
    requests, limits, schedule = random_case(rng)
    produced, done = {}, []
    while schedule.unfinished:
        while (admission := schedule.admit()) is not None:
            check_owners(schedule)
            assert len(set(admission.slots.tolist())) == len(admission.slots)
            assert len(admission.prompt_rows) == sum(len(requests[i].tokens) for i in admission.prompts)
            assert len(set(admission.prompt_rows.tolist())) == len(admission.prompt_rows)
            for slot in admission.slots.tolist():
                produced[slot] = 1
        step = schedule.decode()  # asserts inside that a block is free
        assert len(step.slots), "something runs, or nothing is left"
        assert len(set(step.rows.tolist())) == len(step.rows)
        for row, slot in enumerate(step.slots):
            in_use = step.positions[row] // BLOCK_LEN + 1
            assert in_use <= blocks_needed(np.array(len(requests[schedule.request[slot]].tokens)), limits.max())
            produced[slot] += 1
        check_owners(schedule)
        ended = [s for s in step.slots if produced[s] >= limits[schedule.request[s]] or rng.random() < 0.05]
        done += [(int(schedule.request[s]), int(schedule.sample[s])) for s in ended]
        schedule.finish(np.array(ended, int))
    assert sorted(done) == [(i, s) for i, r in enumerate(requests) for s in range(len(r.keys))]
    assert schedule.blocks.in_use == 1 and not schedule.owed.any()  # the scratch block


def test_a_group_shares_the_blocks_that_its_prompt_fills():
    group = Request(tuple(range(130)), tuple((0, 0, 0, s) for s in range(3)))
    schedule = Schedule([group], np.array([10]), Capacity(3, 9), prefill_tokens=256)
    admission = schedule.admit()
    table = schedule.block_table
    assert (table[:, :2] == table[0, :2]).all() and len(set(table[:, 2].tolist())) == 3
    assert schedule.blocks.owners[table[0, :2]].tolist() == [3, 3]
    assert admission.slot_copies[0].tolist() == [0, 0] and admission.slot_copies[1].tolist() == [1, 2]
    assert admission.block_copies[0].tolist() == [table[0, 2]] * 2
    assert admission.block_copies[1].tolist() == table[1:, 2].tolist()
    schedule.finish(np.array([0, 2]))
    assert schedule.blocks.owners[table[1, :3]].tolist() == [1, 1, 1] and SPARE == 2
