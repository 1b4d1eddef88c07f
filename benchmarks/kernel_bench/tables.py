"""The compile report as a table, on the console and in Markdown."""

from collections.abc import Sequence

import torch
import triton
from rich.console import Console
from rich.table import Table

from kernel_bench.passes import BANDWIDTH, PassReport

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
        "at 990 TFLOP/s (bf16's peak; FP8 has twice that), **not measured**; peers' on an H100."
        " A peer that autotunes is shown at its first",
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
