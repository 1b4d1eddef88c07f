"""What is free is what the system and every limit on this process leave; what does not fit is said in numbers."""

import psutil
import pytest

from prism_mcore.plan import host

GB = 10**9


@pytest.fixture
def groups(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "CGROUPS", tmp_path)

    def write(folder, names, limit, used, cache, key):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, text in zip((*names, "memory.stat"), (limit, used, f"anon 1\n{key} {cache}\n"), strict=True):
            (tmp_path / folder / name).write_text(f"{text}\n")

    return write


def test_the_tightest_limit_of_a_group_and_of_those_above_it_counts(groups):
    v2 = ("memory.max", "memory.current")
    groups("slurm/job_7/step_0", v2, "max", 2 * GB, 0, "inactive_file")
    groups("slurm/job_7", v2, 8 * GB, 5 * GB, 1 * GB, "inactive_file")  # file pages can go
    groups("slurm", v2, 64 * GB, 6 * GB, 0, "inactive_file")
    assert host._left_by_groups("0::/slurm/job_7/step_0\n") == [4 * GB, 58 * GB]
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    groups("memory/docker", v1, 3 * GB, 1 * GB, 0, "total_inactive_file")
    assert host._left_by_groups("5:cpu,memory:/docker/a\n3:cpuset:/b\n") == [2 * GB]


def test_what_is_free_is_the_least_of_all(groups, monkeypatch):
    monkeypatch.setattr(host, "_left_by_groups", lambda: [3 * GB, 10**18])
    assert host.free_memory() == 3 * GB
    monkeypatch.setattr(host, "_left_by_groups", list)
    assert 0 < host.free_memory() <= psutil.virtual_memory().total


def test_what_does_not_fit_is_said_with_what_to_change(monkeypatch):
    monkeypatch.setattr(host, "free_memory", lambda: 24 * GB)
    host.check_fits(24 * GB, "this", "take less")
    with pytest.raises(ValueError, match=r"this needs some 24.5 GB; this machine has 24 GB free; take less"):
        host.check_fits(24.5 * GB, "this", "take less")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"this on 2 ranks needs some 26 GB"):
        host.check_rank_fits(13 * GB, 4, "this", "take less")
