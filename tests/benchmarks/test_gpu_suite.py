"""The script that runs on a GPU names the tests that there are."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_of_a_triton_kernel_runs_on_a_gpu():
    patterns = re.findall(r"tests/kernels/\S+", (ROOT / "benchmarks" / "gpu_suite.sh").read_text())
    named = {path for pattern in patterns for path in ROOT.glob(pattern)}
    assert all(list(ROOT.glob(pattern)) for pattern in patterns)
    kernels = re.compile(r"^from prism_kernels\.\w+(\.triton import| import .*\btriton\b)", re.M)
    assert named == {path for path in ROOT.glob("tests/kernels/*/test_*.py") if kernels.search(path.read_text())}
