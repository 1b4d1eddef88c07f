"""Rotary position embedding of queries and keys in one launch, each read once and written once."""

# t packed tokens, h heads, hk key heads, p head_dim

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_kernels.backends import Uncovered
from prism_kernels.rows import check_dtypes, multiple


@triton.jit
def rotate_rows(
    x,
    out,
    cos,
    sin,
    first,
    num_tokens,
    token_stride,
    head_stride,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SIGN: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """ROWS rows (token, head), from row `first`: halves (a, b) become (a cos - b sin, b cos + a sin)."""
    token_stride = token_stride // MULTIPLE * MULTIPLE
    head_stride = head_stride // MULTIPLE * MULTIPLE
    row = first + tl.arange(0, ROWS)[:, None]
    token = (row // HEADS).to(tl.int64)
    pair = tl.arange(0, BLOCK)[None, :]
    here = (token < num_tokens) & (pair < P // 2)
    source = x + token * token_stride
    source += (row % HEADS) * head_stride + pair
    a = tl.load(source, mask=here).to(tl.float32)
    b = tl.load(source + P // 2, mask=here).to(tl.float32)
    c = tl.load(cos + token * P + pair, mask=here)
    s = SIGN * tl.load(sin + token * P + P // 2 + pair, mask=here)  # the first half holds -sin
    target = out + row.to(tl.int64) * P + pair
    tl.store(target, (a * c - b * s).to(out.dtype.element_ty), mask=here)
    tl.store(target + P // 2, (b * c + a * s).to(out.dtype.element_ty), mask=here)


@triton.jit
def rotate_kernel(
    q,
    k,
    out_q,
    out_k,
    cos,
    sin,
    num_tokens,
    q_blocks,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SIGN: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """The first q_blocks programs rotate q, the others k."""
    i = tl.program_id(0)
    if i < q_blocks:
        rotate_rows(
            q,
            out_q,
            cos,
            sin,
            i * ROWS,
            num_tokens,
            q_token_stride,
            q_head_stride,
            HEADS,
            P,
            ROWS,
            BLOCK,
            SIGN,
            MULTIPLE,
        )
    else:
        rotate_rows(
            k,
            out_k,
            cos,
            sin,
            (i - q_blocks) * ROWS,
            num_tokens,
            k_token_stride,
            k_head_stride,
            KEY_HEADS,
            P,
            ROWS,
            BLOCK,
            SIGN,
            MULTIPLE,
        )


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """New contiguous tensors of the shapes of q [t, h, p] and k [t, hk, p]."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    t, heads, p = q.shape
    out_q, out_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    # Halves of 64: 16 elements of each half per thread (from the compile report, not measured).
    block = triton.next_power_of_2(p // 2)
    rows = max(1, 2048 // block)
    q_blocks, k_blocks = triton.cdiv(t * heads, rows), triton.cdiv(t * k.shape[1], rows)
    strides = q.stride(0), q.stride(1), k.stride(0), k.stride(1)
    rotate_kernel[(q_blocks + k_blocks,)](
        q,
        k,
        out_q,
        out_k,
        cos,
        sin,
        t,
        q_blocks,
        *strides,
        HEADS=heads,
        KEY_HEADS=k.shape[1],
        P=p,
        ROWS=rows,
        BLOCK=block,
        SIGN=sign,
        MULTIPLE=multiple(*strides),
        num_warps=4,
    )
    return out_q, out_k


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(q, k, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k):
        cos, sin = ctx.saved_tensors
        return *_rotate(grad_q, grad_k, cos, sin, -1), None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the halves of each head (non-interleaved, as Llama): q [t, h, p], k [t, hk, p], tables of `rope_table`."""
    check_dtypes(q=q, k=k)
    if q.shape[-1] % 2:
        raise Uncovered(f"head_dim {q.shape[-1]}: needs an even one")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise Uncovered(f"tables of {cos.dtype} and {sin.dtype}: need float32")
    return _Rope.apply(q, k, cos.contiguous(), sin.contiguous())
