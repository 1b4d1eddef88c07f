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


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return mm(x.reshape(-1, x.shape[-1]), weight.t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = mm(rows, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight = mm(rows.t(), x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., k] @ weight [n, k].T, differentiable, all three products through `mm`."""
    return _Linear.apply(x, weight)
