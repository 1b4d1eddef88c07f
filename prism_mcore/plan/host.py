"""Memory of the machine that this process may still take, and what does not fit said before anything is loaded."""

import os
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
PROCESS_BYTES = 700_000_000  # of a process that has imported torch, megatron-core and transformers, without any weight


def free_memory() -> int:
    """Bytes that this machine has left for this process and its children: what the system has available, and what the
    limits of its control groups (containers, Slurm jobs) leave.
    """
    return min([psutil.virtual_memory().available, *_left_by_groups()])


def check_fits(needed: float, what: str, advice: str, *, free: int | None = None, where: str = "this machine") -> None:
    """Raises ValueError, saying what to change, where `needed` bytes are more than what is free."""
    free = free_memory() if free is None else free
    if needed > free:
        raise ValueError(f"{what} needs some {needed / 1e9:.3g} GB; {where} has {free / 1e9:.3g} GB free; {advice}")


def check_rank_fits(needed: float, world_size: int, what: str, advice: str) -> None:
    """As check_fits, for what each of `world_size` ranks needs: on its GPU, or beside the others of this machine."""
    import torch

    if torch.cuda.is_available():
        device = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        check_fits(needed, what, advice, free=torch.cuda.mem_get_info(device)[0], where=f"GPU {device}")
    else:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        check_fits(ranks * needed, what if ranks == 1 else f"{what} on {ranks} ranks", advice)


def _left_by_groups(groups: str | None = None) -> list[int]:
    """What each limit on this process's control groups leaves, from its own group up to the root."""
    try:
        lines = (Path("/proc/self/cgroup").read_text() if groups is None else groups).splitlines()
    except OSError:  # not Linux
        return []
    left = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        root = CGROUPS if number == "0" else CGROUPS / "memory"
        limit, used, cache = (
            ("memory.max", "memory.current", "inactive_file")
            if number == "0"
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        place = Path(path.lstrip("/"))
        for folder in (root / part for part in (place, *place.parents)):
            try:
                allowed = int((folder / limit).read_text())
                statistics = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines() if entry)
                left.append(max(0, allowed - int((folder / used).read_text()) + int(statistics.get(cache, 0))))
            except (OSError, ValueError):  # no such file, or "max"
                continue
    return left
