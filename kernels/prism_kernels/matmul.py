"""Matrix products that take the fastest library on a CPU: oneDNN for fp32, where torch would call MKL.

torch sends bf16 products on a CPU to oneDNN and fp32 ones to MKL, whose AVX-512 code does not run on AMD processors:
98 against 210-230 GFLOP/s on one Zen 5 core. Elsewhere (a GPU, another dtype, a small product) this is torch.mm.
"""

import torch
from torch import Tensor

# The op torch's own compiler emits for x @ w.t(); it is not public, so its absence is not an error.
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_SMALLEST = 2**20  # multiply-adds; below, the call costs more than it gains


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b [k, n] with any strides; no autograd (for use inside autograd.Function)."""
    large = a.shape[0] * a.shape[1] * b.shape[1] >= _SMALLEST
    if ONEDNN is not None and large and a.dtype == torch.float32 and a.device.type == "cpu":
        return ONEDNN(a, b.t(), None, "none", [], "")
    return torch.mm(a, b)
