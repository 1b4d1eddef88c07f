"""Compiles every Triton kernel for Hopper (sm_90) at the real shapes of all seven models, on a machine without a GPU.

    python benchmarks/compile_kernels.py                                  # everything; writes results/compile_sm90.*
    python benchmarks/compile_kernels.py --ops rms_norm swiglu --models llama-3.1-8b --tp 1 --out /tmp/report

Each launcher runs on meta tensors (training at 8,192 tokens, TP 1, 2, 4, 8; decode), Triton's own launcher decides what
it would compile, and that is compiled: registers, spills, shared memory, matrix instructions. Bytes are counted in
Triton's interpreter at reduced sizes and scaled to the real ones (kernel_bench/traffic.py); torch's operations between
launches are counted at the real sizes. Times are a roofline model, the larger of bytes over bandwidth and FLOPs over
peak of each kernel in turn: a floor, not a measurement. Liger-Kernel's and mamba-ssm's Triton kernels go the same way
where they are installed (kernel_bench/peers.py has the lines); where these autotune, the first configuration is taken.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import triton
from kernel_bench.launches import Compiled, Launch, compile_launch
from kernel_bench.op_cases import MODELS, ROWS, TP, Case, cases
from kernel_bench.passes import PassReport, record_case
from kernel_bench.peers import NOT_WITHOUT_GPU, PEERS, TRITON
from kernel_bench.scaling import add_traffic, count_all
from kernel_bench.tables import as_markdown, show, table_rows
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

HERE = Path(__file__).parent


_to_compile: list[Launch] = []  # inherited by the forked processes: launches hold functions, which cannot be sent


def _compile_numbered(number: int) -> tuple[int, Compiled | str]:
    try:
        return number, compile_launch(_to_compile[number])
    except Exception as error:
        return number, f"{type(error).__name__}: {error}"


def compile_all(launches: dict[str, Launch], processes: int, progress: Progress) -> dict[str, Compiled | str]:
    """Each launch compiled, by key; where that fails, the reason."""
    _to_compile[:] = launches.values()
    keys, results = list(launches), {}
    task = progress.add_task("compiling for sm_90", total=len(keys))
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for number, compiled in pool.imap_unordered(_compile_numbered, range(len(keys))):
            results[keys[number]] = compiled
            progress.advance(task)
    return results


def _peers_of(case: Case, wanted: Sequence[str]) -> list[str]:
    return [p for p in PEERS.get(case.row.name, {}) if p in wanted and (case.row.name, p) not in NOT_WITHOUT_GPU]


def make_report(
    selected: Sequence[Case], peers: Sequence[str], traffic: str, processes: int, console: Console
) -> list[PassReport]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    launches: dict[str, Launch] = {}
    reports: list[tuple[Case, PassReport]] = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("running launchers on meta tensors", total=len(selected))
        for case in selected:
            for side in ["ours", *_peers_of(case, peers)]:
                found, new = record_case(case, side)
                launches |= new
                if side == "ours" or any(report.kernels for report in found):
                    reports += [(case, report) for report in found]
            progress.advance(task)
        compiled = compile_all(launches, processes, progress)
        for _, report in reports:
            for kernel in report.kernels:
                result = compiled[kernel.settings.pop("key")]
                if isinstance(result, Compiled):
                    kernel.compiled = result
                else:
                    report.note = f"{kernel.name}: {result}"
        if traffic != "none":
            with_kernels = [(case, report) for case, report in reports if report.kernels]
            if traffic == "memory-bound":
                with_kernels = [(case, report) for case, report in with_kernels if report.memory_bound]
            answers = count_all([(case, report.side) for case, report in with_kernels], processes, progress)
            for case, report in with_kernels:
                add_traffic(report, case, answers)
    return [report for _, report in reports]


def merged(saved: Path, reports: Sequence[PassReport]) -> list[PassReport]:
    """The saved report's passes, those of the same case and side replaced, in the order of the table of ops."""
    new = {(report.case, report.side) for report in reports}
    every = [PassReport.from_json(each) for each in json.loads(saved.read_text())["passes"]]
    kept = [each for each in every if (each.case, each.side) not in new]
    order = [row.name for row in ROWS]
    return sorted([*kept, *reports], key=lambda report: (order.index(report.row), report.phase != "train"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ops", nargs="*", default=[], choices=[r.name for r in ROWS], metavar="OP", help="default: all"
    )
    parser.add_argument("--models", nargs="*", default=[], choices=MODELS, metavar="MODEL", help="default: all seven")
    parser.add_argument("--tp", nargs="*", type=int, default=list(TP), help="tensor-parallel degrees")
    parser.add_argument("--phases", nargs="*", default=[], choices=["train", "decode"], help="default: both")
    parser.add_argument("--peers", nargs="*", default=sorted(TRITON), choices=sorted(TRITON), help="default: all")
    parser.add_argument(
        "--traffic", choices=["all", "memory-bound", "none"], default="all", help="of which ops bytes are counted"
    )
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "compile_sm90", help="writes .json and .md")
    parser.add_argument("--update", action="store_true", help="keep what the report there says of other ops and shapes")
    parser.add_argument("--list", action="store_true", help="say which cases there are, and the least they must do")
    parser.add_argument("--picture", type=Path, help="draw the roofline there (PNG)")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("TRITON_INTERPRET is set: in Triton's interpreter nothing is compiled; unset it")

    if args.list:
        for case in cases(args.ops, args.models, args.tp, args.phases):
            work = case.build("meta")
            least = f"{work.forward_bytes / 1e6:9.1f} MB {work.forward_flops / 1e9:9.1f} GFLOP"
            print(f"{case.name:75} {least}  {', '.join(case.users)}")
        return
    console = Console(stderr=True)
    selected = cases(args.ops, args.models, args.tp, args.phases)
    reports = make_report(selected, args.peers, args.traffic, args.processes, console)
    if args.update:
        reports = merged(args.out.with_suffix(".json"), reports)
    faults = write(reports, args.out, args.picture, console)
    sys.exit(1 if faults else 0)


def write(reports: Sequence[PassReport], out: Path, picture: Path | None, console: Console) -> list[str]:
    """Print the table and write the report, .json and .md; returns its faults."""
    faults = [fault for report in reports if report.side == "ours" for fault in report.faults()]
    rows = table_rows(reports)
    show(rows, Console() if console.is_terminal else Console(width=220))
    for fault in faults:
        console.print(f"[red]fault:[/red] {fault}")
    versions = {"triton": triton.__version__, "torch": torch.__version__, "machine": platform.machine()}
    passes = [report.to_json() for report in reports]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({"versions": versions, "faults": faults, "passes": passes}) + "\n")
    out.with_suffix(".md").write_text(as_markdown(reports, rows, faults))
    if picture:
        from roofline import draw

        draw(passes, picture)
    return faults


if __name__ == "__main__":
    main()
