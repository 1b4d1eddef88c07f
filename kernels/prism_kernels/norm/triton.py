"""RMSNorm in one pass over its rows, with or without the residual sum in front of it; gated.py has the gated one."""

# t rows, d columns

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_kernels.backends import Uncovered
from prism_kernels.norm.gated import gated_rms_norm
from prism_kernels.quantize.scales import magnitude
from prism_kernels.rows import as_rows, check_dtypes, multiple, multiprocessors, tile

__all__ = ["add_rms_norm", "gated_rms_norm", "rms_norm"]

WIDEST = 32768  # columns whose row fits one program's registers in the forward pass
WIDEST_BACKWARD = 8192  # and in the backward pass, which holds four such rows: wider ones are read twice


@triton.jit
def forward_kernel(
    x,
    branch,
    weight,
    out,
    h,
    inverse,
    amax,
    num_rows,
    x_stride,
    branch_stride,
    alpha,
    eps,
    ADD: tl.constexpr,
    STORE: tl.constexpr,
    AMAX: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """out = rms_norm(x), or h = x + alpha * branch and out = rms_norm(h); inverse [t] is 1 / rms.

    With AMAX the bits of out's largest magnitude go into amax [] int32; without STORE out itself goes nowhere.
    """
    x_stride = x_stride // MULTIPLE * MULTIPLE
    branch_stride = branch_stride // MULTIPLE * MULTIPLE
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    here = (rows < num_rows) & (columns < D)
    narrow = tl.load(x + rows * x_stride + columns, mask=here, other=0.0)
    if ADD:
        added = tl.load(branch + rows * branch_stride + columns, mask=here, other=0.0).to(tl.float32)
        narrow = (narrow.to(tl.float32) + alpha * added).to(h.dtype.element_ty)
        tl.store(h + rows * D + columns, narrow, mask=here)
    value = narrow.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / D + eps)
    tl.store(inverse + rows, scale, mask=rows < num_rows)
    if STORE or AMAX:
        normed = (value * scale).to(x.dtype.element_ty).to(tl.float32)
        weights = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
        result = (normed * weights).to(out.dtype.element_ty)
        if STORE:
            tl.store(out + rows * D + columns, result, mask=here)
        if AMAX:
            bits = tl.where(here, magnitude(result.to(tl.float32)), 0)
            tl.atomic_max(amax, tl.max(tl.max(bits, 1), 0))


@triton.jit
def backward_kernel(
    grad,
    grad_h,
    x,
    weight,
    inverse,
    grad_x,
    grad_branch,
    partial,
    num_rows,
    grad_stride,
    grad_h_stride,
    x_stride,
    alpha,
    ADD: tl.constexpr,
    BRANCH: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MULTIPLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grad_x [t, d] (with the sum: grad_h joins it, grad_branch is alpha times it) and this program's share of the
    weight's gradient in row `program` of partial [programs, d]; a program takes every `programs`-th block of rows."""
    grad_stride = grad_stride // MULTIPLE * MULTIPLE
    grad_h_stride = grad_h_stride // MULTIPLE * MULTIPLE
    x_stride = x_stride // MULTIPLE * MULTIPLE
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)[None, :]
    weights = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(program * ROWS, num_rows, programs * ROWS, num_stages=STAGES):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        here = (rows < num_rows) & (columns < D)
        value = tl.load(x + rows * x_stride + columns, mask=here, other=0.0).to(tl.float32)
        upstream = tl.load(grad + rows * grad_stride + columns, mask=here, other=0.0).to(tl.float32)
        if ADD:
            residual = tl.load(grad_h + rows * grad_h_stride + columns, mask=here, other=0.0).to(tl.float32)
        scale = tl.load(inverse + rows, mask=rows < num_rows, other=0.0)
        normed = value * scale
        total += upstream * normed
        weighted = upstream * weights
        mean = tl.sum(weighted * normed, 1, keep_dims=True) / D
        result = (weighted - normed * mean) * scale
        if ADD:
            result += residual
        tl.store(grad_x + rows * D + columns, result.to(grad_x.dtype.element_ty), mask=here)
        if BRANCH:
            tl.store(grad_branch + rows * D + columns, (alpha * result).to(grad_x.dtype.element_ty), mask=here)
    tl.store(partial + program * D + columns, tl.sum(total, 0, keep_dims=True), mask=columns < D)


@triton.jit
def wide_backward_kernel(
    grad,
    grad_h,
    x,
    weight,
    inverse,
    grad_x,
    grad_branch,
    partial,
    num_rows,
    grad_stride,
    grad_h_stride,
    x_stride,
    alpha,
    ADD: tl.constexpr,
    BRANCH: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MULTIPLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`backward_kernel` for rows wider than registers: their columns are read twice, the second time from the cache.

    partial [programs, d] starts as zeros; its row stays in the cache, too, and is visited once per ROWS rows.
    """
    grad_stride = grad_stride // MULTIPLE * MULTIPLE
    grad_h_stride = grad_h_stride // MULTIPLE * MULTIPLE
    x_stride = x_stride // MULTIPLE * MULTIPLE
    program, programs = tl.program_id(0), tl.num_programs(0)
    for start in tl.range(program * ROWS, num_rows, programs * ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        scale = tl.load(inverse + rows, mask=rows < num_rows, other=0.0)
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        for first in tl.range(0, D, BLOCK, num_stages=STAGES):
            columns = first + tl.arange(0, BLOCK)[None, :]
            here = (rows < num_rows) & (columns < D)
            value = tl.load(x + rows * x_stride + columns, mask=here, other=0.0).to(tl.float32)
            upstream = tl.load(grad + rows * grad_stride + columns, mask=here, other=0.0).to(tl.float32)
            products += upstream * value * tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
        mean = tl.sum(products, 1, keep_dims=True) * scale / D
        for first in tl.range(0, D, BLOCK):
            columns = first + tl.arange(0, BLOCK)[None, :]
            here = (rows < num_rows) & (columns < D)
            normed = tl.load(x + rows * x_stride + columns, mask=here, other=0.0).to(tl.float32) * scale
            upstream = tl.load(grad + rows * grad_stride + columns, mask=here, other=0.0).to(tl.float32)
            weights = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
            result = (upstream * weights - normed * mean) * scale
            if ADD:
                result += tl.load(grad_h + rows * grad_h_stride + columns, mask=here, other=0.0).to(tl.float32)
            tl.store(grad_x + rows * D + columns, result.to(grad_x.dtype.element_ty), mask=here)
            if BRANCH:
                tl.store(grad_branch + rows * D + columns, (alpha * result).to(grad_x.dtype.element_ty), mask=here)
            mine = partial + program * D + columns
            so_far = tl.load(mine, mask=columns < D, other=0.0)
            tl.store(mine, so_far + tl.sum(upstream * normed, 0, keep_dims=True), mask=columns < D)
        tl.debug_barrier()  # this program's partial sums are in memory before it reads them again


def norm_forward(
    x: Tensor,
    branch: Tensor | None,
    alpha: float,
    weight: Tensor,
    eps: float,
    store: bool = True,
    amax: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(normed [t, d], h [t, d] or x itself, inverse [t]) of rows x and branch [t, d].

    store: without it, normed is not written and holds nothing. amax: [] int32 that takes the bits of its largest
    magnitude.
    """
    t, d = x.shape
    added = x if branch is None else branch
    kind = torch.promote_types(x.dtype, weight.dtype)
    out = torch.empty((t, d) if store else (0, d), dtype=kind, device=x.device)
    h = x if branch is None else torch.empty(t, d, dtype=x.dtype, device=x.device)
    inverse = torch.empty(t, dtype=torch.float32, device=x.device)
    # 16 elements of a row per thread are two 16-byte accesses (chosen from the compile report, not measured).
    rows, block, warps = tile(d, 16, most_warps=32)
    forward_kernel[(triton.cdiv(t, rows),)](
        x,
        added,
        weight,
        out,
        h,
        inverse,
        amax,
        t,
        x.stride(0),
        added.stride(0),
        alpha,
        eps,
        ADD=branch is not None,
        STORE=store,
        AMAX=amax is not None,
        D=d,
        ROWS=rows,
        BLOCK=block,
        MULTIPLE=multiple(x.stride(0), added.stride(0)),
        num_warps=warps,
    )
    return out, h, inverse


def _backward(
    grad: Tensor, grad_h: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, grad_branch, grad_weight) from rows of gradients; grad_h is None where there was no sum."""
    t, d = x.shape
    residual = grad if grad_h is None else grad_h
    has_branch = grad_h is not None and alpha != 1
    grad_x = torch.empty(t, d, dtype=x.dtype, device=x.device)
    grad_branch = torch.empty_like(grad_x) if has_branch else grad_x
    # Four rows are live (x, grad, weight, its gradient). 512 threads on each multiprocessor and a row ahead keep
    # 32-64 KB in flight there; chosen from the compile report, not measured.
    wide = d > WIDEST_BACKWARD
    rows, block, warps = (4, 2048, 16) if wide else tile(d, 16, most_warps=32)
    programs = min(triton.cdiv(t, rows), multiprocessors(x.device) * (16 // warps))
    partial = (torch.zeros if wide else torch.empty)(programs, d, dtype=torch.float32, device=x.device)
    (wide_backward_kernel if wide else backward_kernel)[(programs,)](
        grad,
        residual,
        x,
        weight,
        inverse,
        grad_x,
        grad_branch,
        partial,
        t,
        grad.stride(0),
        residual.stride(0),
        x.stride(0),
        alpha,
        ADD=grad_h is not None,
        BRANCH=has_branch,
        D=d,
        ROWS=rows,
        BLOCK=block,
        MULTIPLE=multiple(grad.stride(0), residual.stride(0), x.stride(0)),
        STAGES=2,
        num_warps=warps,
    )
    return grad_x, grad_branch, partial.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        out, _, inverse = norm_forward(as_rows(x), None, 0.0, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        grad_x, _, grad_weight = _backward(as_rows(grad), None, as_rows(x), weight, inverse, 0.0)
        return grad_x.view(x.shape), grad_weight, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, alpha, weight, eps):
        out, h, inverse = norm_forward(as_rows(x), as_rows(branch), alpha, weight, eps)
        ctx.save_for_backward(h, weight, inverse)
        ctx.alpha, ctx.shape = alpha, x.shape
        return out.view(x.shape), h.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_h):
        h, weight, inverse = ctx.saved_tensors
        grads = _backward(as_rows(grad), as_rows(grad_h), h, weight, inverse, ctx.alpha)
        grad_x, grad_branch, grad_weight = grads
        return grad_x.view(ctx.shape), grad_branch.view(ctx.shape), None, grad_weight, None


def checked(x: Tensor, weight: Tensor) -> Tensor:
    """The weight, contiguous; `Uncovered` for dtypes and widths that the kernels do not cover."""
    check_dtypes(x=x, weight=weight)
    if x.shape[-1] > WIDEST:
        raise Uncovered(f"{x.shape[-1]} columns: at most {WIDEST}")
    return weight if weight.is_contiguous() else weight.contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; normalised in fp32, cast to x.dtype, then weighted (Llama's order).

    x: [..., d], weight: [d]; returns [..., d] in x.dtype (weight.dtype where that is wider).
    """
    return _RMSNorm.apply(x, checked(x, weight), eps)


def add_rms_norm(x: Tensor, branch: Tensor, alpha: float, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(h), h) for h = x + alpha * branch: the residual sum and the next sub-layer's norm in one pass.

    x, branch: [..., d], weight: [d]; h is rounded to x.dtype before it is normalised.
    """
    if x.dtype != branch.dtype or x.shape != branch.shape:
        raise Uncovered(f"x {x.dtype} {tuple(x.shape)} and branch {branch.dtype} {tuple(branch.shape)} differ")
    return _AddRMSNorm.apply(x, branch, alpha, checked(x, weight), eps)
