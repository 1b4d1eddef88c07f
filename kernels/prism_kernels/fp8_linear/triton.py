"""The product of two quantised matrices on Hopper's FP8 tensor cores, one scale a tensor or one each 128 numbers.

The tensor cores add FP8 products with some 14 bits; partial sums of 128 terms are added in fp32 here, gradients' and
forward products' alike.
"""

# m, n rows of the operands, k summed over

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.backends import Uncovered
from prism_kernels.fp8 import BLOCK, Quantized
from prism_kernels.rows import multiple

TENSOR, ROW, TILE = 0, 1, 2  # how many numbers of an operand share a scale: all, 128 of a row, 128 x 128


@triton.jit
def product_kernel(
    a,
    b,
    out,
    a_scale,
    b_scale,
    m,
    n,
    k,
    B_SHARED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """out [m, n] = a [m, k] @ b [n, k].T; programs go through BM x BN tiles in groups of GROUP rows of them."""
    k_stride = k // MULTIPLE * MULTIPLE
    program, tiles_n = tl.program_id(0), tl.cdiv(n, BN)
    group = program // (GROUP * tiles_n)
    height = min(tl.cdiv(m, BM) - group * GROUP, GROUP)
    m_tile = group * GROUP + program % (GROUP * tiles_n) % height
    n_tile = program % (GROUP * tiles_n) // height
    rows, columns = m_tile * BM + tl.arange(0, BM), n_tile * BN + tl.arange(0, BN)
    # Rows after the last are earlier ones again, and not stored: no load needs a mask for them.
    a_rows, b_rows, terms = rows % m, columns % n, tl.arange(0, BK)
    a_place = a + a_rows[:, None].to(tl.int64) * k_stride + terms[None, :]
    b_place = b + b_rows[None, :].to(tl.int64) * k_stride + terms[:, None]
    blocks = tl.cdiv(k, BK)
    total = tl.zeros([BM, BN], tl.float32)
    for block in range(0, blocks):
        if EVEN:
            x, y = tl.load(a_place), tl.load(b_place)
        else:
            inside = block * BK + terms < k
            x = tl.load(a_place, mask=inside[None, :], other=0.0)
            y = tl.load(b_place, mask=inside[:, None], other=0.0)
        a_place += BK
        b_place += BK
        if B_SHARED == 0:  # TENSOR
            total = tl.dot(x, y, total, max_num_imprecise_acc=BK)
        else:
            left = tl.load(a_scale + a_rows * blocks + block)
            if B_SHARED == 1:  # ROW
                right = tl.load(b_scale + b_rows * blocks + block)
                total += tl.dot(x, y, max_num_imprecise_acc=BK) * left[:, None] * right[None, :]
            else:  # TILE: all columns of the program are of one
                right = tl.load(b_scale + n_tile * BN // BK * blocks + block)
                total += tl.dot(x, y, max_num_imprecise_acc=BK) * (left * right)[:, None]
    if B_SHARED == 0:
        total *= tl.load(a_scale) * tl.load(b_scale)
    here = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(out + rows[:, None].to(tl.int64) * n + columns[None, :], total.to(out.dtype.element_ty), mask=here)


def fp8_linear(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """a [m, k], b [n, k] -> a @ b.T [m, n] of `dtype`; see reference.py."""
    (m, k), n = a.data.shape, len(b.data)
    a_shared, shared = _shared(a), _shared(b)
    if (a_shared == TENSOR) != (shared == TENSOR) or a_shared == TILE:
        raise Uncovered("the first operand needs a scale of its own, or one for each 128 numbers of a row")
    out = torch.empty(m, n, dtype=dtype, device=a.data.device)
    if not out.numel():
        return out
    bm, bn = 128, 128  # 256 columns spill: sums of 128 terms take a second tile of registers
    product_kernel[(triton.cdiv(m, bm) * triton.cdiv(n, bn),)](
        a.data,
        b.data,
        out,
        a.scale_inv,
        b.scale_inv,
        m,
        n,
        k,
        B_SHARED=shared,
        BM=bm,
        BN=bn,
        BK=BLOCK,
        GROUP=8,
        EVEN=k % BLOCK == 0,
        MULTIPLE=multiple(k),
        num_warps=8,
        num_stages=3,
    )
    return out


def _shared(x: Quantized) -> int:
    if x.scale_inv.dim() == 0:
        return TENSOR
    return ROW if len(x.scale_inv) == len(x.data) else TILE
