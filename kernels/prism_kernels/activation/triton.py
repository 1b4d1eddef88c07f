"""Activations of the MLP, elementwise in one pass; both save their input only."""

# t rows, f width of the result

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_kernels.rows import as_rows, check_dtypes, multiple


@triton.jit
def swiglu_kernel(
    gate_up, out, gate_up_stride, F: tl.constexpr, BLOCK: tl.constexpr, MULTIPLE: tl.constexpr, EVEN: tl.constexpr
):
    """out [t, f] = silu(gate) * up, of rows [gate | up]."""
    gate_up_stride = gate_up_stride // MULTIPLE * MULTIPLE
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < F if not EVEN else None
    gate = tl.load(gate_up + row * gate_up_stride + column, mask=here).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + F + column, mask=here).to(tl.float32)
    tl.store(out + row * F + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=here)


@triton.jit
def swiglu_backward_kernel(
    grad,
    gate_up,
    grad_gate_up,
    grad_stride,
    gate_up_stride,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    MULTIPLE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """grad_gate_up [t, 2 f]."""
    grad_stride = grad_stride // MULTIPLE * MULTIPLE
    gate_up_stride = gate_up_stride // MULTIPLE * MULTIPLE
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < F if not EVEN else None
    gate = tl.load(gate_up + row * gate_up_stride + column, mask=here).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + F + column, mask=here).to(tl.float32)
    upstream = tl.load(grad + row * grad_stride + column, mask=here).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate = upstream * up * (sigmoid + silu * (1.0 - sigmoid))
    mine = grad_gate_up + row * (2 * F) + column
    tl.store(mine, grad_gate.to(grad_gate_up.dtype.element_ty), mask=here)
    tl.store(mine + F, (upstream * silu).to(grad_gate_up.dtype.element_ty), mask=here)


@triton.jit
def squared_relu_kernel(
    x, out, x_stride, F: tl.constexpr, BLOCK: tl.constexpr, MULTIPLE: tl.constexpr, EVEN: tl.constexpr
):
    """out [t, f] = max(x, 0)**2."""
    x_stride = x_stride // MULTIPLE * MULTIPLE
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < F if not EVEN else None
    value = tl.load(x + row * x_stride + column, mask=here).to(tl.float32)
    positive = tl.where(value < 0, 0.0, value)  # not a number stays what it is
    tl.store(out + row * F + column, (positive * positive).to(out.dtype.element_ty), mask=here)


@triton.jit
def squared_relu_backward_kernel(
    grad,
    x,
    grad_x,
    grad_stride,
    x_stride,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    MULTIPLE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """grad_x [t, f] = 2 max(x, 0) grad."""
    grad_stride = grad_stride // MULTIPLE * MULTIPLE
    x_stride = x_stride // MULTIPLE * MULTIPLE
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < F if not EVEN else None
    value = tl.load(x + row * x_stride + column, mask=here).to(tl.float32)
    upstream = tl.load(grad + row * grad_stride + column, mask=here).to(tl.float32)
    positive = tl.where(value < 0, 0.0, value)
    tl.store(grad_x + row * F + column, (2.0 * positive * upstream).to(grad_x.dtype.element_ty), mask=here)


def _launch(kernel, tensors: list[Tensor], strided: list[Tensor], f: int) -> None:
    """One program per row and block of columns."""
    t = strided[0].shape[0]
    # 16 elements of each tensor per thread, or 8 where more than an eighth of the lanes would have nothing to do:
    # 16-byte accesses, no spills (from the compile report, not measured).
    block = 2048 if triton.cdiv(f, 2048) * 2048 <= 1.125 * f else 1024
    kernel[(t, triton.cdiv(f, block))](
        *tensors,
        *(x.stride(0) for x in strided),
        F=f,
        BLOCK=block,
        MULTIPLE=multiple(*(x.stride(0) for x in strided)),
        EVEN=f % block == 0,
        num_warps=4,
    )


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        rows, f = as_rows(gate_up), gate_up.shape[-1] // 2
        out = torch.empty(len(rows), f, dtype=rows.dtype, device=rows.device)
        _launch(swiglu_kernel, [rows, out], [rows], f)
        return out.view(*gate_up.shape[:-1], f)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        upstream, rows = as_rows(grad), as_rows(gate_up)
        out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        _launch(swiglu_backward_kernel, [upstream, rows, out], [upstream, rows], grad.shape[-1])
        return out.view(gate_up.shape)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a [..., 2 f] tensor that holds gate in its first half; saves its input only."""
    check_dtypes(gate_up=gate_up)
    return _SwiGLU.apply(gate_up)


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        rows = as_rows(x)
        out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        _launch(squared_relu_kernel, [rows, out], [rows], x.shape[-1])
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        upstream, rows = as_rows(grad), as_rows(x)
        out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        _launch(squared_relu_backward_kernel, [upstream, rows, out], [upstream, rows], x.shape[-1])
        return out.view(x.shape)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)**2; saves its input only."""
    check_dtypes(x=x)
    return _SquaredReLU.apply(x)
