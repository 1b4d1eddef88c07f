"""The MLPs' activations in plain torch; each saves its input only."""

import torch
import torch.nn.functional as F
from torch import Tensor


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, -1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a [..., 2 f] tensor that holds gate in its first half; saves its input only."""
    return _SwiGLU.apply(gate_up)


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu().square_()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return x.relu().mul_(grad).mul_(2)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)**2; saves its input only."""
    return _SquaredReLU.apply(x)
