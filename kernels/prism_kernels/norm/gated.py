"""Mamba-2's output norm: y * silu(z), then RMSNorm over groups of columns; a group may span tensor-parallel ranks."""

# t rows, g groups of this rank, w columns of a group

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_kernels.backends import Uncovered
from prism_kernels.rows import as_rows, check_dtypes, multiple, multiprocessors, tile

WIDEST = 8192  # columns of a group: what the backward pass holds of it fits registers


@triton.jit
def squares_kernel(
    y,
    z,
    squares,
    num_rows,
    y_stride,
    z_stride,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """squares [t] = this rank's sum of (y * silu(z))**2, for one group that spans ranks."""
    y_stride = y_stride // MULTIPLE * MULTIPLE
    z_stride = z_stride // MULTIPLE * MULTIPLE
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    here = (rows < num_rows) & (columns < W)
    value = tl.load(y + rows * y_stride + columns, mask=here, other=0.0).to(tl.float32)
    gate = tl.load(z + rows * z_stride + columns, mask=here, other=0.0).to(tl.float32)
    gated = value * gate * tl.sigmoid(gate)
    tl.store(squares + rows, tl.sum(gated * gated, 1, keep_dims=True), mask=rows < num_rows)


@triton.jit
def forward_kernel(
    y,
    z,
    weight,
    squares,
    out,
    inverse,
    num_rows,
    size,
    y_stride,
    z_stride,
    eps,
    SPANS: tl.constexpr,
    GROUPS: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """out [t, g w] and inverse [t, g] = 1 / rms over the `size` columns of a group; where the group SPANS ranks, its
    sum of squares comes from `squares` [t]."""
    y_stride = y_stride // MULTIPLE * MULTIPLE
    z_stride = z_stride // MULTIPLE * MULTIPLE
    group = tl.program_id(1)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    here, columns = (rows < num_rows) & (columns < W), group * W + columns
    value = tl.load(y + rows * y_stride + columns, mask=here, other=0.0).to(tl.float32)
    gate = tl.load(z + rows * z_stride + columns, mask=here, other=0.0).to(tl.float32)
    gated = value * gate * tl.sigmoid(gate)
    if SPANS:
        total = tl.load(squares + rows, mask=rows < num_rows, other=0.0)
    else:
        total = tl.sum(gated * gated, 1, keep_dims=True)
    scale = tl.rsqrt(total / size + eps)
    tl.store(inverse + rows * GROUPS + group, scale, mask=rows < num_rows)
    weights = tl.load(weight + columns, mask=columns < (group + 1) * W, other=0.0).to(tl.float32)
    tl.store(out + rows * (GROUPS * W) + columns, (gated * scale * weights).to(out.dtype.element_ty), mask=here)


@triton.jit
def dot_kernel(
    grad,
    y,
    z,
    weight,
    inverse,
    dot,
    num_rows,
    grad_stride,
    y_stride,
    z_stride,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """dot [t] = this rank's sum of grad * weight * normed, for one group that spans ranks."""
    grad_stride = grad_stride // MULTIPLE * MULTIPLE
    y_stride = y_stride // MULTIPLE * MULTIPLE
    z_stride = z_stride // MULTIPLE * MULTIPLE
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    here = (rows < num_rows) & (columns < W)
    value = tl.load(y + rows * y_stride + columns, mask=here, other=0.0).to(tl.float32)
    gate = tl.load(z + rows * z_stride + columns, mask=here, other=0.0).to(tl.float32)
    upstream = tl.load(grad + rows * grad_stride + columns, mask=here, other=0.0).to(tl.float32)
    weights = tl.load(weight + columns, mask=columns < W, other=0.0).to(tl.float32)
    products = tl.sum(upstream * weights * value * gate * tl.sigmoid(gate), 1, keep_dims=True)
    scale = tl.load(inverse + rows, mask=rows < num_rows, other=0.0)
    tl.store(dot + rows, products * scale, mask=rows < num_rows)


@triton.jit
def backward_kernel(
    grad,
    y,
    z,
    weight,
    inverse,
    dot,
    grad_y,
    grad_z,
    partial,
    num_rows,
    size,
    grad_stride,
    y_stride,
    z_stride,
    SPANS: tl.constexpr,
    GROUPS: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MULTIPLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grad_y, grad_z [t, g w], and this program's share of the weight's gradient in partial [programs, g w]; a program
    stays in one group and takes every `programs`-th block of rows."""
    grad_stride = grad_stride // MULTIPLE * MULTIPLE
    y_stride = y_stride // MULTIPLE * MULTIPLE
    z_stride = z_stride // MULTIPLE * MULTIPLE
    program, programs, group = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    offsets = tl.arange(0, BLOCK)[None, :]
    columns = group * W + offsets
    weights = tl.load(weight + columns, mask=offsets < W, other=0.0).to(tl.float32)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(program * ROWS, num_rows, programs * ROWS, num_stages=STAGES):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        here = (rows < num_rows) & (offsets < W)
        value = tl.load(y + rows * y_stride + columns, mask=here, other=0.0).to(tl.float32)
        gate = tl.load(z + rows * z_stride + columns, mask=here, other=0.0).to(tl.float32)
        upstream = tl.load(grad + rows * grad_stride + columns, mask=here, other=0.0).to(tl.float32)
        scale = tl.load(inverse + rows * GROUPS + group, mask=rows < num_rows, other=0.0)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        normed = value * silu * scale
        sums += upstream * normed
        weighted = upstream * weights
        if SPANS:
            mean = tl.load(dot + rows, mask=rows < num_rows, other=0.0) / size
        else:
            mean = tl.sum(weighted * normed, 1, keep_dims=True) / size
        grad_gated = (weighted - normed * mean) * scale
        out = rows * (GROUPS * W) + columns
        tl.store(grad_y + out, (grad_gated * silu).to(grad_y.dtype.element_ty), mask=here)
        slope = sigmoid + silu * (1.0 - sigmoid)
        tl.store(grad_z + out, (grad_gated * value * slope).to(grad_z.dtype.element_ty), mask=here)
    tl.store(partial + program * (GROUPS * W) + columns, tl.sum(sums, 0, keep_dims=True), mask=offsets < W)


def _forward(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """(out [t, g w], inverse [t, g]) of rows y, z."""
    t, w = y.shape[0], y.shape[1] // groups
    # 16 elements of y and of z per thread: two 16-byte accesses each (from the compile report, not measured).
    rows, block, warps = tile(w, 16, most_warps=16)
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    inverse = torch.empty(t, groups, dtype=torch.float32, device=y.device)
    size, squares, blocks = w, inverse, triton.cdiv(t, rows)
    step = multiple(y.stride(0), z.stride(0))
    if group is not None:
        size, squares = w * dist.get_world_size(group), torch.empty(t, dtype=torch.float32, device=y.device)
        squares_kernel[(blocks,)](
            y,
            z,
            squares,
            t,
            y.stride(0),
            z.stride(0),
            W=w,
            ROWS=rows,
            BLOCK=block,
            MULTIPLE=step,
            num_warps=warps,
        )
        dist.all_reduce(squares, group=group)
    forward_kernel[(blocks, groups)](
        y,
        z,
        weight,
        squares,
        out,
        inverse,
        t,
        size,
        y.stride(0),
        z.stride(0),
        eps,
        SPANS=group is not None,
        GROUPS=groups,
        W=w,
        ROWS=rows,
        BLOCK=block,
        MULTIPLE=step,
        num_warps=warps,
    )
    return out, inverse


def _backward(
    grad: Tensor, y: Tensor, z: Tensor, weight: Tensor, inverse: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    t, groups = inverse.shape
    w = y.shape[1] // groups
    # Five rows are live (grad, y, z, weight, its gradient): 8 elements per thread, 512 threads on each multiprocessor
    # (1024 would spill) and a block of rows ahead; chosen from the compile report, not measured.
    rows, block, warps = tile(w, 8, most_warps=16)
    programs = min(triton.cdiv(t, rows), max(1, multiprocessors(y.device) * (16 // warps) // groups))
    grad_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    grad_z = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    partial = torch.empty(programs, groups * w, dtype=torch.float32, device=y.device)
    size, dot = w, inverse
    step = multiple(grad.stride(0), y.stride(0), z.stride(0))
    if group is not None:
        size, dot = w * dist.get_world_size(group), torch.empty(t, dtype=torch.float32, device=y.device)
        dot_kernel[(triton.cdiv(t, rows),)](
            grad,
            y,
            z,
            weight,
            inverse,
            dot,
            t,
            grad.stride(0),
            y.stride(0),
            z.stride(0),
            W=w,
            ROWS=rows,
            BLOCK=block,
            MULTIPLE=step,
            num_warps=warps,
        )
        dist.all_reduce(dot, group=group)
    backward_kernel[(programs, groups)](
        grad,
        y,
        z,
        weight,
        inverse,
        dot,
        grad_y,
        grad_z,
        partial,
        t,
        size,
        grad.stride(0),
        y.stride(0),
        z.stride(0),
        SPANS=group is not None,
        GROUPS=groups,
        W=w,
        ROWS=rows,
        BLOCK=block,
        MULTIPLE=step,
        STAGES=2,
        num_warps=warps,
    )
    return grad_y, grad_z, partial.sum(0).to(weight.dtype)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z, weight, eps, num_groups, group):
        out, inverse = _forward(as_rows(y), as_rows(z), weight, eps, num_groups, group)
        ctx.save_for_backward(y, z, weight, inverse)
        ctx.group = group
        return out.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, z, weight, inverse = ctx.saved_tensors
        grads = _backward(as_rows(grad), as_rows(y), as_rows(z), weight, inverse, ctx.group)
        grad_y, grad_z, grad_weight = grads
        return grad_y.view(y.shape), grad_z.view(z.shape), grad_weight, None, None, None


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """RMSNorm of y * silu(z) over each of num_groups equal parts of the last dimension; Mamba-2's output norm.

    y, z: [..., d], weight: [d]; returns [..., d] in y.dtype. num_groups counts the groups on this rank; with one and a
    process `group`, the norm's group is spread over its ranks and the sum of squares is all-reduced in both directions.
    """
    check_dtypes(y=y, z=z, weight=weight)
    if y.shape[-1] % num_groups:
        raise ValueError(
            f"gated_rms_norm: {y.shape[-1]} channels do not split into num_groups={num_groups} equal groups"
        )
    spans = group is not None and dist.get_world_size(group) > 1
    if spans and num_groups != 1:
        raise ValueError(f"gated_rms_norm: a group that spans ranks needs num_groups=1 on each, got {num_groups}")
    if y.shape[-1] // num_groups > WIDEST:
        raise Uncovered(f"groups of {y.shape[-1] // num_groups} columns: at most {WIDEST}")
    return _GatedRMSNorm.apply(y, z, weight.contiguous(), eps, num_groups, group if spans else None)
