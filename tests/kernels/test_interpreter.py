"""Triton's interpreter, as the kernels' tests use it, computes bf16 as a GPU does."""

# m, n, k: sides of a product

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def product_kernel(x, y, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(x + i[:, None] * K + k), tl.load(y + k[:, None] * N + j)
    total = tl.dot(a, b) + tl.sum(a.to(tl.float32), 1)[:, None]
    tl.store(out + i[:, None] * N + j, total.to(tl.bfloat16))


@triton.jit
def double_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(out + i, value + value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not used where there is a GPU")
def test_bf16_products_sums_and_rounding():
    torch.manual_seed(0)
    x, y = torch.randn(32, 64).bfloat16(), torch.randn(64, 16).bfloat16()
    out = torch.empty(32, 16, dtype=torch.bfloat16)
    product_kernel[(1,)](x, y, out, 32, 16, 64)
    exact = (x.double() @ y.double() + x.double().sum(1, keepdim=True)).float().bfloat16()
    assert ((out.float() - exact.float()).abs() <= 2**-7 * exact.float().abs()).all()
    assert (out == exact).float().mean() > 0.95  # rounding to nearest: truncation leaves half of them


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not used where there is a GPU")
def test_bf16_arithmetic_is_refused_rather_than_garbage():
    x = torch.ones(16).bfloat16()
    with pytest.raises(Exception, match="cast to fp32 on load"):
        double_kernel[(1,)](x, torch.empty_like(x), 16)


@triton.jit
def cast_kernel(x, out, back, N: tl.constexpr):
    i = tl.arange(0, N)
    narrow = tl.load(x + i).to(out.dtype.element_ty)
    tl.store(out + i, narrow)
    tl.store(back + i, narrow.to(tl.float32))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not used where there is a GPU")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_rounded_to_nearest_subnormal_numbers_too(dtype):
    x = torch.randn(256, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-18, 6).repeat(11)[:256]
    out, back = torch.empty(256, dtype=dtype), torch.empty(256)
    cast_kernel[(1,)](x, out, back, 256)
    assert torch.equal(out.float(), x.to(dtype).float()) and torch.equal(back, out.float())
