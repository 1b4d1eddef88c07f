"""Bytes and FLOPs at the real sizes, from what traffic.py counts at reduced ones."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from kernel_bench.launches import MULTIPROCESSORS
from kernel_bench.op_cases import Case
from kernel_bench.passes import PassReport

BENCHMARKS = Path(__file__).parents[1]


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
        path = os.pathsep.join([str(BENCHMARKS), *sys.path])
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        found: dict[str, Count] = {}
        with subprocess.Popen(
            [sys.executable, "-m", "kernel_bench.traffic"], env=environment, stdin=-1, stdout=-1
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
