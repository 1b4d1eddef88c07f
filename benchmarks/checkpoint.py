"""Saving and loading on two ranks, beside an earlier version of this program: seconds, and memory at the peak.

    git worktree add ../before 56915bb      # megatron-core's `fully_reshardable`
    python benchmarks/checkpoint.py --before ../before --gb 2 --rounds 3

The model is one of the tests' tiny ones made large: bf16 with fp32 masters and moments, 14 bytes a parameter, of which
the checkpoint has --gb. Sides take turns, each in processes of its own; what is loaded is not in the page cache. Minima
are printed, and written as JSON.
"""

import argparse
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BYTES_PER_PARAMETER = 14
WIDTH = 2048


def main() -> None:
    """Run every side in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of an earlier version")
    parser.add_argument("--gb", type=float, default=2.0, help="of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tp", type=int, default=1, choices=(1, 2), help="tensor-parallel instead of data-parallel")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--stall", action="store_true", help="also an asynchronous save: its stall, and the rest")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        measure(options)
        return
    sides = {"now": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(options.rounds):
        for name, checkout in sides.items():
            found[name].append(run_side(checkout, options))
            print(number, name, found[name][-1], flush=True)
    best = {name: {key: min(one[key] for one in rounds) for key in rounds[0]} for name, rounds in found.items()}
    print(json.dumps(best, indent=1))
    if options.out:
        options.out.write_text(json.dumps({"gb": options.gb, "tp": options.tp, **best}, indent=1) + "\n")


def run_side(checkout: Path, options: argparse.Namespace) -> dict[str, float]:
    """One save and load by two ranks of a checkout; the slower rank's figures."""
    with socket.socket() as free, tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        paths = os.pathsep.join(map(str, (checkout, checkout / "kernels", checkout / "tests")))
        environment = os.environ | {
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
        ranks = []
        for rank in range(2):
            command = [sys.executable, "-P", __file__, "--rank", str(rank), "--folder", folder]
            command += ["--gb", str(options.gb), "--tp", str(options.tp)] + ["--stall"] * options.stall
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=own, cwd=checkout, stdout=subprocess.PIPE, text=True))
        said = [rank.communicate()[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            raise RuntimeError("a rank failed")
        figures = [json.loads(text.splitlines()[-1]) for text in said]
        return {key: max(one[key] for one in figures) for key in figures[0]}


class Peak:
    """Memory of this process above what it had, at the peak: sampled, for the kernel's own peak cannot be reset."""

    def __enter__(self) -> "Peak":
        self.before, self.most, self.done = resident(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self.most = max(self.most, resident() - self.before)

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(options: argparse.Namespace) -> None:
    """Of one rank: save, asynchronous save, load."""
    from prism_mcore import platform

    platform.start()
    import torch.distributed as dist
    from tiny import toy

    from prism_mcore.checkpoint.load import load
    from prism_mcore.checkpoint.optimizer_state import initialise_state
    from prism_mcore.checkpoint.save import Checkpoints
    from prism_mcore.parallel import ParallelSettings, init_groups
    from prism_mcore.train.settings import CheckpointSettings

    groups = init_groups(ParallelSettings(tp=options.tp))
    toy.D, toy.V = WIDTH, WIDTH
    toy.NUM_LAYERS = max(1, round(options.gb * 1e9 / BYTES_PER_PARAMETER / (4 * WIDTH**2)))
    model = toy.Toy(groups, bf16=True)
    initialise_state(model.optimizer)
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters().values())}

    def timed(name: str, action: Any) -> None:
        dist.barrier()
        begun = time.monotonic()
        with Peak() as peak:
            action()
        dist.barrier()
        figures[f"{name}_s"] = round(time.monotonic() - begun, 2)
        figures[f"{name}_peak_gb"] = round(peak.most / 1e9, 3)

    saves = Checkpoints(options.folder, CheckpointSettings(), groups)
    timed("save", lambda: saves.save(1, model.chunks, model.optimizer, {}))
    for file in (options.folder / "step_00000001").iterdir():  # a run that resumes finds nothing in the page cache
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    timed("load", lambda: load(options.folder / "step_00000001", model.chunks, model.optimizer, groups))
    if options.stall:
        shutil.rmtree(options.folder / "step_00000001") if groups.rank == 0 else None
        later = Checkpoints(options.folder, CheckpointSettings(async_save=True), groups)
        timed("async_stall", lambda: later.save(2, model.chunks, model.optimizer, {}))
        timed("async_rest", later.wait)
    print(json.dumps(figures))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
