"""Compiles every Triton kernel for Hopper (sm_90) at the real shapes of all seven models, on a machine without a GPU.

    python benchmarks/compile_kernels.py                                  # everything; writes results/compile_sm90.*
    python benchmarks/compile_kernels.py --ops rms_norm swiglu --models llama-3.1-8b --tp 1 --out /tmp/report

Each launcher runs on meta tensors (training at 8,192 tokens, TP 1, 2, 4, 8; decode), Triton's own launcher decides what
it would compile, and that is compiled: registers, spills, shared memory, matrix instructions. Bytes are counted in
Triton's interpreter at reduced sizes and scaled to the real ones (traffic.py); torch's operations between launches are
counted at the real sizes. Times are a roofline model, the larger of bytes over bandwidth and FLOPs over peak of each
kernel in turn: a floor, not a measurement. Liger-Kernel's and mamba-ssm's Triton kernels go the same way where they are
installed (peers.py has the lines); where these autotune, their first configuration is taken.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import triton
from launches import MULTIPROCESSORS, Compiled, Launch, TorchOp, compile_launch, reading_values, recorded
from op_cases import MODELS, ROWS, TP, Case, Work, cases, differentiable
from peers import NOT_WITHOUT_GPU, PEERS, TRITON, prepare
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE = Path(__file__).parent
PEAK_FLOPS = 990e12  # bf16, dense
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # bytes per second
BYTES_ALLOWED = 1.3  # times the minimum, for memory-bound ops
SHARED_BYTES = 227 * 1024  # that a program on sm_90 may have; a kernel that takes more cannot be launched


@dataclass
class KernelReport:
    """One kernel of one pass: how often it runs, what it compiled to, what it moves at the real size."""

    name: str
    launches: int
    settings: dict[str, Any]
    compiled: Compiled | None = None
    bytes: float | None = None  # distinct sectors, read and written
    requested_bytes: float | None = None
    product_flops: float = 0.0

    def seconds(self, bandwidth: float) -> float | None:
        return None if self.bytes is None else max(self.bytes / bandwidth, self.product_flops / PEAK_FLOPS)


@dataclass
class PassReport:
    """Forward or backward of one op at one shape, ours or a peer's."""

    case: str
    row: str
    phase: str
    direction: str
    side: str
    shape: dict[str, Any]
    users: list[str]
    memory_bound: bool
    minimum_bytes: int
    needed_flops: float
    kernels: list[KernelReport] = field(default_factory=list)
    torch_ops: list[TorchOp] = field(default_factory=list)
    note: str = ""

    @property
    def bytes(self) -> float | None:
        counted = [kernel.bytes for kernel in self.kernels]
        if any(x is None for x in counted) or not (self.kernels or self.torch_ops):
            return None
        return sum(x for x in counted if x is not None) + sum(op.bytes for op in self.torch_ops)

    @property
    def requested_bytes(self) -> float | None:
        if self.bytes is None:
            return None
        return sum(k.requested_bytes or 0 for k in self.kernels) + sum(op.bytes for op in self.torch_ops)

    @property
    def flops(self) -> float:
        return sum(kernel.product_flops for kernel in self.kernels) + sum(op.flops for op in self.torch_ops)

    def seconds(self, gpu: str) -> float | None:
        if self.bytes is None:
            return None
        bandwidth = BANDWIDTH[gpu]
        between = sum(max(op.bytes / bandwidth, op.flops / PEAK_FLOPS) for op in self.torch_ops)
        return between + sum(kernel.seconds(bandwidth) or 0 for kernel in self.kernels)

    def floor_seconds(self, gpu: str) -> float:
        """No version of the op is faster: its fewest bytes, its needed products."""
        return max(self.minimum_bytes / BANDWIDTH[gpu], self.needed_flops / PEAK_FLOPS)

    def faults(self) -> list[str]:
        """What must not be: too much shared memory, spills, products off the fast path, bytes moved for nothing.

        Decode may use small tiles.
        """
        where = f"{self.case} {self.direction}"
        found = []
        for kernel in self.kernels:
            if kernel.compiled is None:
                continue
            if kernel.compiled.shared_bytes > SHARED_BYTES:
                found.append(f"{where}: {kernel.name} takes {kernel.compiled.shared_bytes / 1024:.0f} KB shared memory")
            if kernel.compiled.spills:
                found.append(f"{where}: {kernel.name} spills ({kernel.compiled.spills})")
            if kernel.compiled.other_products and self.phase != "decode":
                found.append(f"{where}: {kernel.name} has products without wgmma: {kernel.compiled.other_products}")
        if self.memory_bound and self.bytes is not None and self.bytes > BYTES_ALLOWED * self.minimum_bytes:
            found.append(f"{where}: moves {self.bytes / self.minimum_bytes:.2f}x the minimum of bytes")
        return found

    def to_json(self) -> dict[str, Any]:
        times = {gpu: {"model_s": self.seconds(gpu), "floor_s": self.floor_seconds(gpu)} for gpu in BANDWIDTH}
        totals = {"bytes": self.bytes, "requested_bytes": self.requested_bytes, "flops": self.flops}
        return asdict(self) | totals | {"times": times}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "PassReport":
        report = cls(**{each.name: saved[each.name] for each in fields(cls)})
        report.kernels = [KernelReport(**kernel) for kernel in saved["kernels"]]
        for kernel in report.kernels:
            kernel.compiled = Compiled(**kernel.compiled) if kernel.compiled else None
        report.torch_ops = [TorchOp(**op) for op in saved["torch_ops"]]
        return report


# --------------------------------------------------------------------------------------------------------- recording


def record_case(case: Case, side: str) -> tuple[list[PassReport], dict[str, Launch]]:
    """The passes of an op with the launches each makes, and those launches by key."""
    work = case.build("meta")
    directions = ["forward", "backward"] if work.leaves else ["forward"]
    reports = [_empty_report(case, side, direction, work) for direction in directions]
    launches: dict[str, Launch] = {}
    try:
        for report, (found, torch_ops) in zip(reports, _run_passes(case, side), strict=True):
            report.torch_ops = _merge(torch_ops)
            for launch in found:
                _add_launch(report, launch)
                launches[launch.key] = launch
    except Exception as error:
        for report in reports:
            report.note = f"{type(error).__name__}: {error}".splitlines()[0]
    return reports, launches


def _run_passes(case: Case, side: str) -> list[tuple[list[Launch], list[TorchOp]]]:
    passes = []
    peculiar = contextlib.nullcontext() if side == "ours" else reading_values()
    with peculiar, torch.set_grad_enabled(case.phase == "train"):
        work = case.build("meta")
        with recorded() as forward:
            call, leaves = prepare(case, work, side)
            forward.torch_ops.clear()  # of laying out a peer's inputs
            outputs = call()
        passes.append((forward.launches, forward.torch_ops))
        if leaves:
            results = differentiable(outputs)
            upstream = [torch.empty_like(x) for x in results]
            with recorded() as backward:
                torch.autograd.grad(results, leaves, upstream, allow_unused=True)
            passes.append((backward.launches, backward.torch_ops))
    return passes


def _empty_report(case: Case, side: str, direction: str, work: Work) -> PassReport:
    forward = direction == "forward"
    return PassReport(
        case=case.name,
        row=case.row.name,
        phase=case.phase,
        direction=direction,
        side=side,
        shape=case.shape,
        users=case.users,
        memory_bound=case.row.memory_bound,
        minimum_bytes=work.forward_bytes if forward else work.backward_bytes,
        needed_flops=work.forward_flops if forward else work.backward_flops,
    )


def _merge(ops: Iterable[TorchOp]) -> list[TorchOp]:
    totals: dict[str, TorchOp] = {}
    for op in ops:
        total = totals.setdefault(op.name, TorchOp(op.name, 0, 0.0))
        total.bytes += op.bytes
        total.flops += op.flops
    return list(totals.values())


def _add_launch(report: PassReport, launch: Launch) -> None:
    settings = {name: repr(value) for name, value in launch.settings.items()}
    settings |= {name: launch.options[name] for name in ("num_warps", "num_stages")}
    settings["key"] = launch.key
    for kernel in report.kernels:
        if kernel.settings == settings:
            kernel.launches += 1
            return
    report.kernels.append(KernelReport(launch.name, 1, settings))


# --------------------------------------------------------------------------------------------------------- compiling

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


# ----------------------------------------------------------------------------------------------------------- traffic


@dataclass(frozen=True)
class Sample:
    """At which size bytes are counted."""

    tokens: int
    multiprocessors: int


def samples(case: Case) -> list[Sample]:
    """Two token counts; for persistent kernels the smaller again with twice the multiprocessors; decode at its size."""
    small, large = case.row.reduced
    if case.phase == "decode" and case.row.persistent:
        return [Sample(case.tokens // 2, MULTIPROCESSORS), Sample(case.tokens, MULTIPROCESSORS)]
    found = [Sample(small, 2), Sample(large, 2)]
    return [*found, Sample(small, 4)] if case.row.persistent else found


Count = dict[str, Any]  # what traffic.py answers
Request = dict[str, Any]


def _request(case: Case, side: str, sample: Sample) -> Request:
    shape, _ = case.row.narrow(case.shape)
    return {"row": case.row.name, "phase": case.phase, "shape": shape, "side": side, **asdict(sample)}


def count_all(wanted: Sequence[tuple[Case, str]], processes: int, progress: Progress) -> dict[str, Count]:
    """What traffic.py answers to every distinct request of these (case, side), by the request as JSON."""
    asked = {json.dumps(r): r for case, side in wanted for s in samples(case) for r in [_request(case, side, s)]}
    task = progress.add_task("counting bytes in the interpreter", total=len(asked))

    def serve(share: list[str]) -> dict[str, Count]:
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        found: dict[str, Count] = {}
        with subprocess.Popen(
            [sys.executable, str(HERE / "traffic.py")], env=environment, stdin=-1, stdout=-1
        ) as process:
            assert process.stdin and process.stdout
            process.stdin.write(json.dumps([asked[key] for key in share]).encode())
            process.stdin.close()
            for key, line in zip(share, process.stdout, strict=False):
                found[key] = json.loads(line)
                progress.advance(task)
        stopped = {"error": f"traffic.py ended with {process.returncode}"}
        return {key: found.get(key, stopped) for key in share}

    # ours and the peers' apart: the patch that makes bf16 right for ours refuses what theirs do
    sides = [[key for key, r in asked.items() if (r["side"] == "ours") is ours] for ours in (True, False)]
    shares = [keys[i::processes] for keys in sides for i in range(processes)]
    answers: dict[str, Count] = {}
    with ThreadPoolExecutor(processes) as pool:
        for found in pool.map(serve, [share for share in shares if share]):
            answers |= found
    return answers


def add_traffic(report: PassReport, case: Case, answers: dict[str, Count]) -> None:
    """Scale what was counted to the real size, for each kernel: a plane in tokens and multiprocessors, times width."""
    counts = [answers[json.dumps(_request(case, report.side, sample))] for sample in samples(case)]
    failed = [count["error"] for count in counts if "error" in count]
    if failed:
        report.note = report.note or f"not counted: {failed[0]}"
        return
    _, factor = case.row.narrow(case.shape)
    for name in {kernel.name for kernel in report.kernels}:
        same = [kernel for kernel in report.kernels if kernel.name == name]
        totals = [count[report.direction].get(name) for count in counts]
        if None in totals:
            report.note = report.note or f"{name} does not run at the reduced size"
            continue
        number_of_launches = sum(kernel.launches for kernel in same)
        real = {key: factor * _at_real_size(case, [total[key] for total in totals]) for key in totals[0]}
        flops = factor * _flops_at_real_size(case, report, [total["product_flops"] for total in totals])
        for kernel in same:
            share = kernel.launches / number_of_launches
            kernel.bytes = (real["read"] + real["written"]) * share
            kernel.requested_bytes = real["requested"] * share
            kernel.product_flops = flops * share


def _at_real_size(case: Case, numbers: Sequence[float]) -> float:
    first, second, *third = samples(case)
    slope = (numbers[1] - numbers[0]) / (second.tokens - first.tokens)
    value = numbers[1] + slope * (case.tokens - second.tokens)
    if third:
        per_multiprocessor = (numbers[2] - numbers[0]) / (third[0].multiprocessors - first.multiprocessors)
        value += per_multiprocessor * (MULTIPROCESSORS - first.multiprocessors)
    return value


def _flops_at_real_size(case: Case, report: PassReport, numbers: Sequence[float]) -> float:
    """A straight line in the tokens; for attention a sum of what is needed (pairs) and of blocks on the diagonal."""

    def needed(tokens: int) -> float:
        work = case.build("meta", tokens)
        return work.forward_flops if report.direction == "forward" else work.backward_flops

    first, second = (sample.tokens for sample in samples(case)[:2])
    per_token = [needed(tokens) / tokens for tokens in (first, second)]
    if per_token[0] == per_token[1]:
        return _at_real_size(case, numbers)
    by_need = (numbers[1] / second - numbers[0] / first) / (per_token[1] - per_token[0])
    by_token = numbers[1] / second - by_need * per_token[1]
    return by_need * needed(case.tokens) + by_token * case.tokens


# ------------------------------------------------------------------------------------------------------------ report


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


HEADER = [
    "op",
    "shape",
    "",
    "regs",
    "spills",
    "shared",
    "wgmma",
    "bytes",
    "requested",
    "GFLOP",
    "H100",
    "H200",
    "peers",
]


def table_rows(reports: Sequence[PassReport]) -> list[list[str]]:
    """Ours, one row a pass; the last column is the same model's time for the peers' kernels on an H100."""
    theirs: dict[tuple[str, str], list[PassReport]] = {}
    for report in reports:
        if report.side != "ours":
            theirs.setdefault((report.case, report.direction), []).append(report)
    rows = []
    for report in (report for report in reports if report.side == "ours"):
        numbers = " ".join(f"{key} {value}" for key, value in report.shape.items())
        row = [report.row, f"{report.phase} {numbers}", report.direction, *_compiled_columns(report)]
        row += [_times(report.bytes, report.minimum_bytes), _times(report.requested_bytes, report.minimum_bytes)]
        row += [
            f"{report.flops / 1e9:.1f}" if report.flops else "",
            *(_micro(report.seconds(gpu)) for gpu in BANDWIDTH),
        ]
        peers = theirs.get((report.case, report.direction), [])
        row.append(", ".join(f"{peer.side} {_micro(peer.seconds('H100'))}{_spilling(peer)}" for peer in peers))
        rows.append(row)
    return rows


def _compiled_columns(report: PassReport) -> list[str]:
    compiled = [kernel.compiled for kernel in report.kernels if kernel.compiled]
    if not compiled:
        return [report.note[:60] if report.note else "torch only", "", "", ""]
    wgmma, others = sum(x.wgmma for x in compiled), sum(len(x.other_products) for x in compiled)
    return [
        str(max(x.registers for x in compiled)),
        str(sum(x.spills for x in compiled)),
        f"{max(x.shared_bytes for x in compiled) / 1024:.0f} KB",
        f"{wgmma}/{wgmma + others}" if wgmma + others else "",
    ]


def _spilling(peer: PassReport) -> str:
    spills = sum(kernel.compiled.spills for kernel in peer.kernels if kernel.compiled)
    return f" ({spills} spills)" if spills else ""


def _times(value: float | None, minimum: float) -> str:
    return f"{value / minimum:.2f}x" if value is not None and minimum else ""


def _micro(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.1f} us"


def show(rows: Sequence[Sequence[str]], console: Console) -> None:
    table = Table(title="Kernels for sm_90; times are a roofline model, not measured")
    for column in HEADER:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def as_markdown(reports: Sequence[PassReport], rows: Sequence[Sequence[str]], faults: Sequence[str]) -> str:
    lines = [
        "# Kernels compiled for Hopper (sm_90)",
        "",
        f"`python benchmarks/compile_kernels.py`, triton {triton.__version__}, torch {torch.__version__}; no GPU was",
        "used. Registers per thread (the most of the pass's kernels), spills (local loads and stores and stack bytes),",
        "shared memory, products that became wgmma of those with at least 64 rows. Bytes: distinct 32-byte sectors per",
        "launch, and bytes requested, both over the fewest possible (each input read once, each result written once),",
        "torch's operations between launches included. Times: a roofline model on 3.35 TB/s (H100) and 4.8 TB/s (H200)",
        "at 990 TFLOP/s bf16, **not measured**; peers' on an H100. A peer that autotunes is shown at its first",
        "configuration.",
        "",
        "Models and layouts: " + ", ".join(sorted({user for report in reports for user in report.users})) + ".",
        "",
        "Faults: " + ("none." if not faults else ""),
        *(f"- {fault}" for fault in faults),
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


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
    parser.add_argument("--picture", type=Path, help="draw the roofline there (PNG)")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("TRITON_INTERPRET is set: in Triton's interpreter nothing is compiled; unset it")

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
