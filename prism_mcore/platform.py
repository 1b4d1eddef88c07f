"""Device and process start-up: `start()` is the first thing every entry script and every test rank calls."""

import contextlib
import ctypes
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from prism_mcore.megatron_patches import CPU, patch_megatron

# A collective that waits longer than this ends the run. A killed peer is noticed at once (its sockets close); this
# bound is for a peer that hangs. Who may work longer alone meets the others through `meeting.Meeting`.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)

# Ranks of a job import at the same time, from one file system perhaps; one whose peers are not there by then ends.
RENDEZVOUS_TIMEOUT = timedelta(minutes=5)

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def start(
    threads: int | None = None, timeout: timedelta = COLLECTIVE_TIMEOUT, deterministic: bool = False
) -> torch.device:
    """Choose this rank's device and start the default process group; calling it again changes nothing.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them; without
    RANK the process is a group of one. threads: torch's threads on a CPU; by default this rank's share of the cores.
    deterministic: the same bits every time on a GPU, too; a CPU is deterministic anyway.
    """
    if deterministic and torch.cuda.is_available():
        _be_deterministic()
    device = _cuda_device() if torch.cuda.is_available() else _cpu_device(threads)
    if not dist.is_initialized():
        _init_process_group(device, timeout)
    return device


def shutdown() -> None:
    """End the default process group and every group made from it; does nothing where none was started."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _be_deterministic() -> None:
    """Choose libraries' reproducible paths; they read these when they start."""
    os.environ.update(
        CUBLAS_WORKSPACE_CONFIG=":4096:8",  # cuBLAS otherwise picks a workspace, and so an order of sums, per stream
        NCCL_ALGO="Ring",  # otherwise chosen per message, and with it the order of sums
        NVTE_ALLOW_NONDETERMINISTIC_ALGO="0",  # Transformer Engine's attention backward without atomics
    )
    torch.use_deterministic_algorithms(True)


def _cuda_device() -> torch.device:
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= count:
        raise RuntimeError(
            f"rank {local_rank} of this node has no GPU: there are {count}; start torchrun with"
            f" --nproc-per-node={count}, or with CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _cpu_device(threads: int | None) -> torch.device:
    if threads is not None:
        torch.set_num_threads(threads)
    elif not _threads_are_chosen():  # torch has read OMP_NUM_THREADS otherwise
        # More threads than cores compete for them: two ranks with two threads each on two cores ran 4x slower.
        cores = len(os.sched_getaffinity(0))
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
        torch.set_num_threads(max(1, cores // local_ranks))
    _keep_freed_memory()
    patch_megatron()
    return CPU


def _threads_are_chosen() -> bool:
    """Has a person set OMP_NUM_THREADS? torchrun sets 1 by itself, which its own environment, as it was started, lacks.

    /proc shows that of torchrun, the parent; where it cannot be read, the variable is taken for the person's.
    """
    if "OMP_NUM_THREADS" not in os.environ or "TORCHELASTIC_RUN_ID" not in os.environ:
        return "OMP_NUM_THREADS" in os.environ
    try:
        given = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return True
    return any(variable.startswith(b"OMP_NUM_THREADS=") for variable in given)


def _init_process_group(device: torch.device, timeout: timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    store, rank, size = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, size = next(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
        _meet(store, size)
        store.set_timeout(timeout)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("default_pg", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device_id,
    )


def _meet(store: dist.Store, size: int) -> None:
    """Wait until so many ranks have found the store: the backend's own start would wait as long as a collective."""
    if store.add("started", 1) % size == 0:  # the last; tests start groups again from a store that is there
        store.set("all started", "")
    try:
        store.wait(["all started"], RENDEZVOUS_TIMEOUT)
    except dist.DistStoreError as error:
        raise RuntimeError(
            f"{store.add('started', 0)} of {size} ranks have started within {RENDEZVOUS_TIMEOUT}; the logs of the"
            " others say why they have not"
        ) from error


def _keep_freed_memory() -> None:
    """Tell malloc never to hand big blocks back to the kernel: page faults cost 5-8% of a training step."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing to tune
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def release_freed_memory() -> None:
    """Hand freed blocks back to the kernel after all, between parts of a step that need them in other sizes.

    Generating, scoring and training each fragment what the others left: 1,160 MB of an RL step became 880. Costs the
    page faults of one pass over that memory; does nothing where CUDA is available.
    """
    if not torch.cuda.is_available():
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
