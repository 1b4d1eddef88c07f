"""Export and import of a Llama-shaped checkpoint against copying the same bytes with fsync, and their memory.

    python benchmarks/convert.py [--layers 5 --rounds 3] [--dir DIR]

The model has the shapes of Llama-3.1-8B and a few of its layers (5 are 4.3 GB in bf16), in shards of 1 GB. Each side
runs in a fresh process, imports not timed, rounds interleaved, the best counts; everything is read from the page cache
and on the disk when the clock stops. Peak memory is the growth of the resident set over that after imports.

    copy            shutil.copyfile and fsync, nothing checked
    import          from-hf: the checkpoint's files hashed
    verify          the first part of to-hf: the SHA-256 of every file of the checkpoint
    export          the second part: files and tensors hashed, each for itself
    checked copy    the same care for plain files: sha256sum, copy with fsync, sha256sum, files in parallel
Writes benchmarks/results/convert.json.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHARD_BYTES = 10**9
RESULTS = Path(__file__).parent / "results" / "convert.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="a disk with 5x the bytes free")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # one timed run, in its own process
    options = parser.parse_args()
    if options.side:
        print(json.dumps(timed(SIDES[options.side], options.dir)))
        return
    folder = Path(tempfile.mkdtemp(prefix="prism_benchmark_convert_", dir=options.dir))
    try:
        print(json.dumps(compare(folder, options.layers, options.rounds), indent=1))
    finally:
        shutil.rmtree(folder)


def compare(folder: Path, layers: int, rounds: int) -> dict[str, Any]:
    size = make_directory(folder / "hf", layers, folder)
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            shutil.rmtree(folder / "out", ignore_errors=True)
            os.sync()
            command = [sys.executable, __file__, "--side", side, "--dir", str(folder)]
            runs[side].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
            if side == "import":
                shutil.rmtree(folder / "ckpt", ignore_errors=True)
                (folder / "out").rename(folder / "ckpt")  # what is verified and exported
            print(side, runs[side][-1], file=sys.stderr)
    if not same_files(folder / "hf", folder / "out"):
        raise SystemExit("the export is not the directory that was imported")
    best = {side: min(run["seconds"] for run in found) for side, found in runs.items()}
    results = {
        "gigabytes": size / 1e9,
        "largest_tensor_mb": largest_tensor(folder / "hf") / 1e6,
        "megabytes_per_s": {side: size / 1e6 / seconds for side, seconds in best.items()},
        "of_copy": {side: best["copy"] / best[side] for side in ("import", "export")},
        "verify_and_export_of_checked_copy": best["checked copy"] / (best["verify"] + best["export"]),
        "peak_memory_mb": {side: max(run["peak_mb"] for run in runs[side]) for side in OURS},
        "seconds": {side: [round(run["seconds"], 2) for run in found] for side, found in runs.items()},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return results


# --- what is timed ----------------------------------------------------------------------------------------------------


Side = Callable[[Path], Callable[[], object]]  # prepares, and gives what is timed


def timed(side: Side, folder: Path) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = side(folder)
    before = resident_bytes()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"seconds": seconds, "peak_mb": peak / 1e6}


def copy(folder: Path) -> Callable[[], object]:
    def run() -> None:
        (folder / "out").mkdir()
        for path in sorted((folder / "hf").iterdir()):
            shutil.copyfile(path, folder / "out" / path.name)
            with open(folder / "out" / path.name, "rb") as file:
                os.fsync(file.fileno())

    return run


def checked_copy(folder: Path) -> Callable[[], object]:
    def run() -> None:
        hash_files(folder / "hf")
        copy(folder)()
        hash_files(folder / "out")

    return run


def hash_files(folder: Path) -> None:
    """sha256sum, one process for each processor."""
    command = ["xargs", "-n", "1", "-P", str(os.cpu_count()), "sha256sum"]
    names = "\n".join(str(path) for path in folder.iterdir())
    subprocess.run(command, input=names.encode(), stdout=subprocess.DEVNULL, check=True)


def import_(folder: Path) -> Callable[[], object]:
    from prism_mcore.convert.offline import import_hf, plan_import

    return lambda: import_hf(plan_import(folder / "hf"), folder / "out")


def verify(folder: Path) -> Callable[[], object]:
    from prism_mcore.convert.offline import plan_export

    return lambda: plan_export(folder / "ckpt")


def export(folder: Path) -> Callable[[], object]:
    from prism_mcore.convert.offline import export_checkpoint, plan_export

    plan = plan_export(folder / "ckpt")
    return lambda: export_checkpoint(plan, folder / "out")


OURS: dict[str, Side] = {"import": import_, "verify": verify, "export": export}
SIDES: dict[str, Side] = {"copy": copy, "checked copy": checked_copy, **OURS}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# --- what it is timed on ----------------------------------------------------------------------------------------------


def make_directory(out: Path, layers: int, folder: Path) -> int:
    """A directory of random bf16 weights; returns its bytes."""
    import torch

    from prism_mcore.convert.names import hf_tensors
    from prism_mcore.convert.write import conventional_directory, write_directory
    from prism_mcore.model.spec import read_config, spec_from_config

    raw = read_config("llama-3.1-8b") | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(raw))
    spec = spec_from_config(raw)
    dtypes = dict.fromkeys(hf_tensors(spec), torch.bfloat16)
    source = conventional_directory(spec, folder, (folder / "config.json",), dtypes, SHARD_BYTES)
    size = sum(shard.size for shard in source.shards.values())
    if shutil.disk_usage(folder).free < 5 * size:
        raise SystemExit(
            f"{folder} has not {5 * size / 1e9:.0f} GB free; give --dir on another disk, or fewer --layers"
        )
    generator = torch.Generator().manual_seed(0)

    def read_rows(name: str, start: int, rows: torch.Tensor) -> None:
        rows.copy_(torch.empty(rows.shape).normal_(std=0.02, generator=generator))

    write_directory(out, source, read_rows)
    (out / "manifest.json").unlink()  # an export's, not a downloaded directory's
    return size


def largest_tensor(path: Path) -> int:
    from prism_mcore.convert.read import read_directory

    return max(entry.end - entry.start for _, _, entry in read_directory(path).entries())


def same_files(path: Path, out: Path) -> bool:
    names = sorted(file.name for file in path.iterdir())
    return all(subprocess.run(["cmp", "-s", path / name, out / name]).returncode == 0 for name in names)


if __name__ == "__main__":
    main()
