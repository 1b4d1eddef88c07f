"""What one pass of an op compiles to and moves: recorded on meta tensors, ours and the peers'."""

import contextlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from kernel_bench.launches import Compiled, Launch, TorchOp, reading_values, recorded
from kernel_bench.op_cases import Case
from kernel_bench.peers import prepare
from kernel_bench.works import Work, differentiable

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
