"""Matrix products that take the fastest library on a CPU: oneDNN for fp32, where torch would call MKL.

torch sends bf16 products on a CPU to oneDNN and fp32 ones to MKL, whose AVX-512 code does not run on AMD processors:
98 against 210-230 GFLOP/s on one Zen 5 core. On Intel both are as fast, but oneDNN copies a transposed left side first.
Elsewhere (a GPU, another dtype, a small product) this is torch.mm.
"""

from pathlib import Path

import torch
from torch import Tensor

# The op torch's own compiler emits for x @ w.t(); it is not public, so its absence is not an error.
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_SMALLEST = 2**20  # multiply-adds; below, the call costs more than it gains
_CPU = Path("/proc/cpuinfo")
_MKL_IS_FAST = _CPU.exists() and "GenuineIntel" in _CPU.read_text()


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b [k, n] with any strides; no autograd (for use inside autograd.Function)."""
    large = a.shape[0] * a.shape[1] * b.shape[1] >= _SMALLEST
    copies = not a.is_contiguous()  # of a weight gradient's left side
    if ONEDNN is None or not large or a.dtype != torch.float32 or a.device.type != "cpu" or (copies and _MKL_IS_FAST):
        return torch.mm(a, b)
    return ONEDNN(a, b.t(), None, "none", [], "")
