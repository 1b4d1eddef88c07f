"""Ranks that are slow are waited for; one that hangs ends the run, and is named."""

import time
from datetime import timedelta

import pytest
from ranks import RankError, run_ranks

from prism_mcore.meeting import Meeting


def meet(groups, works_s, says, silence_s):
    """Rank 1 works so long and says so, or not; when each left each of two meetings, since the start."""
    meeting, left, begun = Meeting.of_all_ranks(timedelta(seconds=silence_s)), [], time.monotonic()
    for _ in range(2):
        while groups.rank == 1 and time.monotonic() - begun < works_s * (len(left) + 1):
            time.sleep(0.02)
            if says:
                meeting.working()
        meeting.join()
        left.append(time.monotonic() - begun)
    return left


def test_a_slow_rank_is_waited_for():
    for first, second in run_ranks(2, meet, 1.2, True, 0.5):
        assert 1.2 <= first < 2.2 <= second + 0.01 < 3.6


def test_ranks_that_come_together_do_not_wait():
    begun = time.monotonic()
    assert max(run_ranks(2, meet, 0.0, False, 60.0))[-1] < 2
    assert time.monotonic() - begun < 15


def test_a_silent_rank_is_named():
    with pytest.raises(RankError) as error:
        run_ranks(2, meet, 60.0, False, 0.5)
    assert "LostRank: rank 1 said nothing for 0.5 s while rank 0 waited" in error.value.reports[0]
