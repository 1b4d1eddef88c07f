"""Activations whose elements have the same bits wherever they lie in memory; the squared ReLU is the reference's."""

from torch import Tensor

from prism_kernels.activation import reference
from prism_kernels.activation.reference import squared_relu
from prism_kernels.precision import accumulate_dtype

__all__ = ["silu", "squared_relu", "swiglu"]


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)); no autograd."""
    return x / x.neg().exp_().add_(1)


class _SwiGLU(reference._SwiGLU):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return silu(gate.to(accumulate_dtype(gate.dtype))).mul_(up).to(gate.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a [..., 2 f] tensor that holds gate in its first half, rounded once."""
    return _SwiGLU.apply(gate_up)
