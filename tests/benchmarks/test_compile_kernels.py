"""Our Triton kernels, compiled for Hopper on a CPU: no spills, wgmma for products, no bytes moved for nothing.

In processes of their own: within the test session Triton only interprets.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prism_kernels import table

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OPS = [
    "rms_norm",
    "add_rms_norm",
    "gated_rms_norm",
    "swiglu",
    "fp8_amax",
    "fp8_quantize blockwise",
    "fp8_quantize_weight",
    "rms_norm_quantize tensorwise",
    "swiglu_quantize blockwise",
    "causal_conv1d",
    "ssd_scan",
    "attention",
    "linear_cross_entropy",
]

FAULTY = """
import json
import sys

import torch
import triton
import triton.language as tl

sys.path.insert(0, sys.argv[1])
from kernel_bench.launches import compile_launch, recorded


@triton.jit
def product_kernel(x, y, out, PRECISION: tl.constexpr):
    i = tl.arange(0, 64)
    place = i[:, None] * 64 + i
    tl.store(out + place, tl.dot(tl.load(x + place), tl.load(y + place), input_precision=PRECISION))


@triton.jit
def crowded_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    values = tl.load(x + i)
    tl.store(out + i, values / tl.sum(values))


@triton.jit
def copy_kernel(x, out, size, stride):
    i = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(out + i * stride, tl.load(x + i, mask=i < size), mask=i < size)


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, device="meta", dtype=dtype)


with recorded() as record:
    product_kernel[(1,)](meta(64, 64), meta(64, 64), meta(64, 64, dtype=torch.float32), "tf32", num_warps=4)
    wide = meta(64, 64, dtype=torch.float32)
    product_kernel[(1,)](wide, wide, wide, "ieee", num_warps=4)
    crowded_kernel[(1,)](meta(4096), meta(4096), 4096, num_warps=1, maxnreg=32)
    copy_kernel[(8,)](meta(8192), meta(8192), 8192, 1)
    copy_kernel[(8,)](meta(8193)[1:], meta(8193)[1:], 8191, 1)
launches = [compile_launch(launch) for launch in record.launches]
print(json.dumps([[x.spills, x.wgmma, x.other_products, x.wide_loads] for x in launches]))
"""

WIDE_HEADS = """
import json
import sys

import torch

sys.path.insert(0, sys.argv[1])
from kernel_bench.passes import KernelReport, PassReport
from kernel_bench.launches import compile_launch, recorded

from prism_kernels.boundaries import Boundaries
from prism_kernels.scan.inputs import ScanInputs
from prism_kernels.scan.triton import ssd_scan


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, device="meta", dtype=dtype).requires_grad_()


boundaries = Boundaries(torch.tensor([0, 1024], dtype=torch.int32))
inputs = [meta(1024, 4, 128), meta(1024, 4), *(meta(4, dtype=torch.float32) for _ in range(3))]
x, dt, A_log, D, dt_bias = inputs
with recorded() as record:
    scan = ScanInputs(x, dt, A_log, meta(1024, 1, 128), meta(1024, 1, 128), D, dt_bias)
    y = ssd_scan(scan, boundaries, 128)
with recorded() as backward:
    torch.autograd.grad(y, inputs, torch.empty_like(y))
found = {}
for launch in record.launches + backward.launches:
    kernel = KernelReport(launch.name, 1, {}, compile_launch(launch))
    report = PassReport("scan", "ssd_scan", "train", "", "ours", {}, [], False, 0, 0.0, [kernel])
    found[launch.name] = kernel.compiled.shared_bytes, [x for x in report.faults() if "shared memory" in x]
    kernel.compiled = type(kernel.compiled)(**{**vars(kernel.compiled), "shared_bytes": 300 * 1024})
    assert "takes 300 KB shared memory" in report.faults()[0]
print(json.dumps(found))
"""

WITHOUT_BIAS = """
import sys

import torch

sys.path.insert(0, sys.argv[1])
from kernel_bench.launches import compile_launch, recorded

from prism_kernels.boundaries import Boundaries
from prism_kernels.conv.triton import causal_conv1d

x, weight = (torch.empty(shape, device="meta").requires_grad_() for shape in ((64, 32), (32, 4)))
boundaries = Boundaries(torch.tensor([0, 64], dtype=torch.int32))
with recorded() as record:
    y = causal_conv1d(x, weight, None, boundaries)
with recorded() as backward:
    torch.autograd.grad(y, (x, weight), torch.empty_like(y))
for launch in record.launches + backward.launches:
    compile_launch(launch)
"""


def run(*command: str, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": interpret}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


def test_spills_slow_products_and_narrow_accesses_are_seen(tmp_path: Path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    done = run(str(script), str(BENCHMARKS))
    assert done.returncode == 0, done.stderr
    fast, slow, crowded, aligned, offset = json.loads(done.stdout)
    assert fast[:3] == [0, 1, []]
    assert slow[1:3] == [0, ["64x64 * 64x64 f32"]]
    assert crowded[0] > 0
    assert aligned[3] == 1.0  # 16 bytes a thread, as Triton specialises whole pointers and sizes
    assert offset[3] == 0.0  # and as it does for a view that starts at an odd element


def test_the_scan_of_the_widest_heads_fits_a_gpus_shared_memory(tmp_path: Path):
    script = tmp_path / "wide.py"
    script.write_text(WIDE_HEADS)
    done = run(str(script), str(BENCHMARKS))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"outputs_kernel", "inner_grads_kernel", "group_grads_kernel"} <= set(found)
    assert all(size <= 227 * 1024 and not faults for size, faults in found.values()), found


def test_the_convolution_compiles_without_a_bias(tmp_path: Path):
    """The interpreter does not look at branches it does not take."""
    script = tmp_path / "without_bias.py"
    script.write_text(WITHOUT_BIAS)
    done = run(str(script), str(BENCHMARKS))
    assert done.returncode == 0, done.stderr


def test_no_kernel_spills_misses_wgmma_or_moves_more_than_it_must(tmp_path: Path):
    """One small layout; `python benchmarks/compile_kernels.py` does all models and layouts."""
    report = tmp_path / "report"
    where = ["--models", "granite-4.0-h-micro", "--tp", "8", "--phases", "train"]
    how = ["--traffic", "memory-bound", "--peers", "--out", str(report)]
    done = run(str(BENCHMARKS / "compile_kernels.py"), *where, "--ops", *OPS, *how)
    assert report.with_suffix(".json").exists(), done.stderr
    result = json.loads(report.with_suffix(".json").read_text())
    assert result["faults"] == []
    assert done.returncode == 0, done.stderr
    passes = result["passes"]
    assert {each["row"] for each in passes} >= set(OPS)
    for each in passes:
        assert each["kernels"], each["case"] + ": no kernel of ours ran: " + each["note"]
        assert all(kernel["compiled"] for kernel in each["kernels"]), each["note"]
        assert each["bytes"] or not each["memory_bound"], each["case"] + ": " + each["note"]
    products = [p for p in passes if p["row"] in ("ssd_scan", "attention")]
    assert all(any(kernel["compiled"]["wgmma"] for kernel in p["kernels"]) for p in products)


def test_measuring_needs_a_gpu_and_says_so_but_runs_toy_shapes_without():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = str(BENCHMARKS / "measure_kernels.py")
    refused = run(script, "--ops", "swiglu")
    assert refused.returncode == 1
    assert "no GPU here" in refused.stderr
    toy = run(script, "--smoke", "--ops", "swiglu", "rope", "--phases", "train", interpret="1")
    assert toy.returncode == 0, toy.stderr
    assert len(re.findall(r"(swiglu|rope) train: .* (ours|torch): error \d", toy.stdout)) == 4


def test_every_op_with_a_triton_kernel_is_compiled_and_measured():
    listing = [sys.executable, "-c", "from kernel_bench.op_cases import ROWS; print(*(row.op for row in ROWS))"]
    compiled = subprocess.run(listing, cwd=BENCHMARKS, capture_output=True, text=True, check=True).stdout.split()
    ops = {name for name, op in table.OPS.items() if "triton" in op.backends}
    ops.remove("ssd_prefill")  # ssd_scan's kernels, and a copy of its final states
    assert ops - set(compiled) == set()
