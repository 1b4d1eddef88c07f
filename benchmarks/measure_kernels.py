"""Measures every op on the GPU it finds, forward and forward + backward, beside every peer that is installed.

    python benchmarks/measure_kernels.py            # three models' shapes; writes results/kernels_<gpu>.*
    python benchmarks/measure_kernels.py --ops ssd_scan --models granite-4.0-h-micro --tp 1 2 --rounds 50
    python benchmarks/measure_kernels.py --dry-run  # what would be measured, with which peers; needs no GPU
    TRITON_INTERPRET=1 python benchmarks/measure_kernels.py --smoke    # each op once at a toy shape, on a CPU too

Times are CUDA events around one call, queued behind a device-side pause so that no launch gap counts, with the L2
cache flushed before each; all sides of an op take turns and each one's minimum is taken. GB/s are the fewest bytes the
op must move, and TFLOP/s the products it needs, over the time; their shares are of a copy and of a matrix product
measured in the same run. Error: the largest, over the result and all gradients, of |x - exact| / |exact| against the
reference op in fp64 (fp32 where products are large). Peers and how to install them: kernel_bench/peers.py.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton
from kernel_bench.op_cases import MODELS, ROWS, Case, cases
from kernel_bench.peers import PEERS, Prepared, prepare
from kernel_bench.works import Work, differentiable
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import register_dataclass, tree_flatten, tree_unflatten

from prism_kernels import backends, interpreter
from prism_kernels.caches import PagedCache, SlotCache
from prism_kernels.scan.inputs import ScanInputs

HERE = Path(__file__).parent
DEFAULT_MODELS = ["llama-3.1-8b", "nemotron-h-8b", "granite-4.0-h-micro"]
PAUSE_CYCLES = 10_000_000  # about five milliseconds: the host queues a whole call meanwhile; the scan takes it two
SMOKE_TOKENS = 32
register_dataclass(ScanInputs)  # its tensors are inputs as an argument's are


@dataclass
class Measurement:
    case: str
    side: str  # "ours", a peer, or "torch compiled"
    forward_s: float | None = None
    both_s: float | None = None  # forward and backward
    spread: float | None = None  # of the rounds of both_s: median over minimum
    forward_gb_s: float | None = None
    both_gb_s: float | None = None
    both_tflop_s: float | None = None
    share_of_copy: float | None = None  # of forward and backward together
    share_of_matmul: float | None = None
    peak_bytes: int | None = None  # beyond the inputs
    error: float | None = None
    note: str = ""


# ----------------------------------------------------------------------------------------------------------- calling


def sides_of(case: Case, compiled: bool) -> list[str]:
    peers = list(PEERS.get(case.row.name, {}))
    return ["ours", *peers, *(["torch compiled"] if compiled and "torch" in peers else [])]


def prepare_side(case: Case, work: Work, side: str) -> Prepared:
    if side != "torch compiled":
        return prepare(case, work, side)
    call, leaves = prepare(case, work, "torch")
    return torch.compile(call), leaves


def run_once(call: Callable[[], Any], leaves: tuple[Tensor, ...], upstream: list[Tensor]) -> tuple[Any, tuple]:
    """(results, gradients of the leaves), with the gradient of each result made on the first call and kept."""
    outputs = call()
    if not leaves:
        return outputs, ()
    results = differentiable(outputs)
    if not upstream:
        generator = torch.Generator(results[0].device).manual_seed(0)
        upstream += [upstream_of(x, generator) for x in results]
    return outputs, torch.autograd.grad(results, leaves, upstream, allow_unused=True)


def upstream_of(result: Tensor, generator: torch.Generator) -> Tensor:
    """A gradient for a result: the same for every side, whatever the dtype; 1 for a loss."""
    if result.dim() == 0:
        return torch.ones_like(result)
    return torch.randn(result.shape, device=result.device, generator=generator).to(result.dtype)


def exact_results(case: Case, device: str, tokens: int) -> list[Tensor]:
    """The first result and the gradients that the reference op gives for the same inputs in higher precision."""
    work = case.build(device, tokens)
    wide = torch.float64 if case.row.memory_bound else torch.float32
    flat, layout = tree_flatten(work.args)
    cast = {id(x): x.detach().to(wide).requires_grad_(x.requires_grad) for x in flat if is_real(x)}
    args = tree_unflatten([cast.get(id(x), widened(x, wide)) for x in flat], layout)
    leaves = tuple(cast[id(x)] for x in work.leaves)
    reference = backends.function(case.row.op, "reference")
    outputs, grads = run_once(lambda: reference(*args, **work.kwargs), leaves, [])
    return comparable(outputs if work.returns else args[0][0], grads)


def widened(x: Any, dtype: torch.dtype) -> Any:
    """A decode cache in another dtype; anything else as it is."""
    if isinstance(x, SlotCache | PagedCache):
        return type(x)(*(getattr(x, field.name).detach().to(dtype, copy=True) for field in fields(x)))
    return x


def is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def comparable(outputs: Any, grads: tuple) -> list[Tensor]:
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    return [x.detach() for x in (first, *grads) if isinstance(x, Tensor)]


def largest_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Of the result, and of the gradients where a peer's leaves are the same as ours."""
    pairs = list(zip(got, exact, strict=True)) if len(got) == len(exact) else [(got[0], exact[0])]
    pairs = [(a, b) for a, b in pairs if a.numel() == b.numel()]
    errors = [((a.double().flatten() - b.double().flatten()).norm() / b.double().norm()).item() for a, b in pairs]
    return float("nan") if not errors or any(e != e for e in errors) else max(errors)


# --------------------------------------------------------------------------------------------------------- measuring


class Timer:
    """Times calls on the GPU, each with a cold L2 cache and no gap between its launches."""

    def __init__(self) -> None:
        self.flush = torch.empty(512 * 2**20, dtype=torch.uint8, device="cuda")

    def __call__(
        self, call: Callable[[], Any], leaves: tuple[Tensor, ...], upstream: list[Tensor]
    ) -> tuple[float, float]:
        """(seconds of forward, of forward and backward) of one call."""
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        self.flush.zero_()
        torch.cuda._sleep(PAUSE_CYCLES)
        start.record()
        outputs = call()
        middle.record()
        if leaves:
            torch.autograd.grad(differentiable(outputs), leaves, upstream, allow_unused=True)
        end.record()
        end.synchronize()
        return start.elapsed_time(middle) / 1e3, start.elapsed_time(end) / 1e3


def measured_ceilings(timer: Timer, rounds: int) -> dict[str, float]:
    """bytes/s of a device-to-device copy (read and written) and FLOP/s of a bf16 matrix product, random operands."""
    source, n = torch.empty(2**30, dtype=torch.uint8, device="cuda"), 8192
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy_s = min(timer(lambda: target.copy_(source), (), [])[1] for _ in range(rounds))
    product_s = min(timer(lambda: a @ b, (), [])[1] for _ in range(rounds))
    return {"copy_bytes_s": 2 * 2**30 / copy_s, "matmul_flop_s": 2 * n**3 / product_s}


def measure_case(case: Case, sides: Sequence[str], rounds: int, timer: Timer, ceilings: dict) -> list[Measurement]:
    """Every side of one op at one shape, taking turns."""
    exact = exact_results(case, "cuda", case.tokens)
    work = case.build("cuda")
    prepared: dict[str, Prepared] = {}
    ready: dict[str, tuple[Callable, tuple, list[Tensor]]] = {}
    found = {side: Measurement(case.name, side) for side in sides}
    for side in sides:  # all before any of them runs: a decode step changes the state it is given
        with noted(found[side]):
            prepared[side] = prepare_side(case, work, side)
    for side, (call, leaves) in prepared.items():
        upstream: list[Tensor] = []
        with noted(found[side]):
            outputs, grads = run_once(call, leaves, upstream)
            found[side].error = largest_error(comparable(outputs if work.returns else work.args[0][0], grads), exact)
            del outputs, grads
            found[side].peak_bytes = peak_memory(call, leaves, upstream)
            ready[side] = call, leaves, upstream
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in ready}
    for _ in range(rounds):
        for side, (call, leaves, upstream) in ready.items():
            times[side].append(timer(call, leaves, upstream))
    for side in ready:
        summarise(found[side], times[side], work, ceilings)
    missing = ("ImportError", "ModuleNotFoundError")
    return [m for m in found.values() if m.side == "ours" or not m.note.startswith(missing)]


@contextlib.contextmanager
def noted(found: Measurement) -> Iterator[None]:
    """An error ends a side, not the run: it becomes the side's note."""
    try:
        yield
    except Exception as error:
        found.note = f"{type(error).__name__}: {error}".splitlines()[0][:200]


def peak_memory(call: Callable, leaves: tuple, upstream: list[Tensor]) -> int:
    """Bytes a forward and backward needs beyond what is there before it, the second time it runs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_once(call, leaves, upstream)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def summarise(found: Measurement, times: Sequence[tuple[float, float]], work: Work, ceilings: dict) -> None:
    found.forward_s = min(forward for forward, _ in times)
    found.both_s = min(both for _, both in times)
    found.spread = statistics.median(both for _, both in times) / found.both_s
    moved, flops = work.forward_bytes + work.backward_bytes, work.forward_flops + work.backward_flops
    found.forward_gb_s, found.both_gb_s = work.forward_bytes / found.forward_s / 1e9, moved / found.both_s / 1e9
    found.share_of_copy = moved / found.both_s / ceilings["copy_bytes_s"]
    if flops:
        found.both_tflop_s = flops / found.both_s / 1e12
        found.share_of_matmul = flops / found.both_s / ceilings["matmul_flop_s"]


# ------------------------------------------------------------------------------------------------------ without a GPU


def dry_run(selected: Sequence[Case], compiled: bool, console: Console) -> None:
    """Which sides each case would have here."""
    for case in selected:
        work = case.build("meta")
        sides = []
        for side in sides_of(case, compiled):
            try:
                prepare(case, work, "torch" if side == "torch compiled" else side)
                sides.append(side)
            except Exception as error:
                sides.append(f"[dim]no {side} ({type(error).__name__})[/dim]")
        console.print(f"{case.name}: {', '.join(sides)}", highlight=False)


def smoke(selected: Sequence[Case], device: str, console: Console) -> bool:
    """Every op once at a toy shape beside torch; was everything right?"""
    if interpreter.active():
        interpreter.install()
    good = True
    for case in selected:
        exact = exact_results(case, device, SMOKE_TOKENS)
        for side in ("ours", "torch"):
            if side == "torch" and "torch" not in PEERS.get(case.row.name, {}):
                continue
            start = time.perf_counter()
            try:
                work = case.build(device, SMOKE_TOKENS)
                call, leaves = prepare(case, work, side)
                outputs, grads = run_once(call, leaves, [])
                error = largest_error(comparable(outputs if work.returns else work.args[0][0], grads), exact)
            except Exception as problem:
                good = False
                console.print(f"{case.name} {side}: {type(problem).__name__}: {problem}")
                continue
            good &= error < 0.03
            console.print(f"{case.name} {side}: error {error:.1e}, {time.perf_counter() - start:.1f} s")
    return good


# ------------------------------------------------------------------------------------------------------------ report

HEADER = [
    "op",
    "side",
    "forward",
    "both ways",
    "GB/s",
    "of copy",
    "TFLOP/s",
    "of matmul",
    "memory",
    "error",
    "note",
]


def table_rows(measurements: Sequence[Measurement]) -> list[list[str]]:
    def shown(value: float | None, form: str, factor: float = 1.0) -> str:
        return "" if value is None else form.format(value * factor)

    return [
        [
            m.case,
            m.side,
            shown(m.forward_s, "{:.1f} us", 1e6),
            shown(m.both_s, "{:.1f} us", 1e6),
            shown(m.both_gb_s, "{:.0f}"),
            shown(m.share_of_copy, "{:.0%}"),
            shown(m.both_tflop_s, "{:.0f}"),
            shown(m.share_of_matmul, "{:.0%}"),
            shown(m.peak_bytes, "{:.0f} MB", 1e-6),
            shown(m.error, "{:.1e}"),
            m.note,
        ]
        for m in measurements
    ]


def as_markdown(rows: Sequence[Sequence[str]], result: dict[str, Any]) -> str:
    ceilings = result["ceilings"]
    lines = [
        f"# Kernels measured on {result['gpu']}",
        "",
        f"`{result['command']}`, torch {torch.__version__}, triton {triton.__version__}; minima of {result['rounds']}",
        f"interleaved rounds, L2 flushed. Copy {ceilings['copy_bytes_s'] / 1e12:.2f} TB/s, matrix product",
        f"{ceilings['matmul_flop_s'] / 1e12:.0f} TFLOP/s on this card in this run. GB/s, TFLOP/s and shares are of",
        "forward and backward together, on the fewest bytes and the products needed.",
        *([f"Tests on this GPU: {result['tests']}."] if result.get("tests") else []),
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def test_counts(files: Sequence[Path]) -> dict[str, int]:
    """Totals of pytest's junit files."""
    suites = [suite for file in files if file.exists() for suite in ElementTree.parse(file).getroot().iter("testsuite")]
    return {key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ops", nargs="*", default=[], choices=[r.name for r in ROWS], metavar="OP", help="default: all"
    )
    parser.add_argument(
        "--models", nargs="*", default=DEFAULT_MODELS, choices=MODELS, metavar="MODEL", help="default: %(default)s"
    )
    parser.add_argument("--tp", nargs="*", type=int, default=[1], help="tensor-parallel degrees (default: 1)")
    parser.add_argument("--phases", nargs="*", default=[], choices=["train", "decode"], help="default: both")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="10 rounds, without torch.compile")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured")
    parser.add_argument("--smoke", action="store_true", help="each op once at a toy shape, without timings")
    parser.add_argument(
        "--tests", nargs="*", type=Path, default=[], help="pytest's junit files, to be counted in the report"
    )
    parser.add_argument("--out", type=Path, help="writes .json and .md; default: results/kernels_<gpu>")
    args = parser.parse_args()

    console = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.smoke:
        if device == "cpu" and not interpreter.active():
            sys.exit("no GPU: set TRITON_INTERPRET=1, so that Triton's interpreter runs the kernels")
        toys = cases(args.ops, ["demo-hybrid", "demo-dense"], [1], args.phases)
        sys.exit(0 if smoke(toys, device, console) else "an op is wrong at its toy shape")
    selected = cases(args.ops, args.models, args.tp, args.phases)
    if args.dry_run:
        dry_run(selected, not args.quick, console)
        return
    if device == "cpu":
        sys.exit("no GPU here: nothing can be measured. --dry-run says what would be, --smoke runs toy shapes on a CPU")
    measure(args, selected, console)


def measure(args: argparse.Namespace, selected: Sequence[Case], console: Console) -> None:
    rounds = 10 if args.quick else args.rounds
    gpu, timer = torch.cuda.get_device_name(), Timer()
    ceilings = measured_ceilings(timer, rounds)
    result: dict[str, Any] = {
        "gpu": gpu,
        "command": " ".join(["python", *sys.argv]),
        "rounds": rounds,
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "ceilings": ceilings,
    }
    if args.tests:
        result["tests"] = test_counts(args.tests)
    out = args.out or HERE / "results" / f"kernels_{gpu.lower().replace(' ', '_')}"
    measurements: list[Measurement] = []
    for case in track(selected, "measuring", console=console):
        with torch.set_grad_enabled(case.phase == "train"):
            try:
                measurements += measure_case(case, sides_of(case, not args.quick), rounds, timer, ceilings)
            except Exception as error:  # one op must not cost the others' numbers
                measurements.append(Measurement(case.name, "ours", note=f"{type(error).__name__}: {error}"[:200]))
        write(out, result, measurements)  # after every op: what ends the run early leaves what it had
        torch.cuda.empty_cache()
    table = Table(title=f"Measured on {gpu}")
    for column in HEADER:
        table.add_column(column, overflow="fold")
    for row in table_rows(measurements):
        table.add_row(*row)
    console.print(table)
    console.print(f"wrote {out}.json and .md")


def write(out: Path, result: dict[str, Any], measurements: Sequence[Measurement]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    complete = result | {"measurements": [asdict(m) for m in measurements]}
    out.with_suffix(".json").write_text(json.dumps(complete, indent=1) + "\n")
    out.with_suffix(".md").write_text(as_markdown(table_rows(measurements), result))


if __name__ == "__main__":
    main()
