"""Products of quantised matrices: exact operands, sums in fp32, and what each library covers."""

import pytest
import torch
from tiny.accuracy import DEVICE

from prism_kernels.backends import Uncovered
from prism_kernels.fp8 import E4M3, E5M2, Quantized
from prism_kernels.fp8_linear import exact, reference, triton
from prism_kernels.fp8_linear.peers import fp8_linear_by_torch, padded, scales
from prism_kernels.quantize.reference import fp8_quantize, fp8_quantize_weight


def operands(m=48, k=160, n=32, recipe="tensorwise", a_format=E4M3):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    return fp8_quantize(a, recipe, a_format)[0], fp8_quantize_weight(b, recipe, E4M3)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("product", [reference.fp8_linear, exact.fp8_linear])
def test_sums_are_rounded_once(recipe, dtype, product):
    a, b = operands(recipe=recipe)
    want = a.dequantized(torch.float32).double() @ b.dequantized(torch.float32).double().t()
    got = product(a, b, dtype).double()
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}[dtype]
    assert (got - want).abs().max() <= rounding * want.abs().max()


def test_it_is_the_product_that_transformer_engine_defines():
    """(qa @ qb.T) * (1/sa * 1/sb) in fp32: powers of two move no bit, whether they are applied before or after."""
    a, b = operands()
    want = (a.data.float() @ b.data.float().t()) * (a.scale_inv * b.scale_inv)
    assert torch.equal(a.dequantized(torch.float32) @ b.dequantized(torch.float32).t(), want)


@pytest.mark.parametrize("a_format", [E4M3, E5M2])
def test_torch_multiplies_with_one_scale_on_a_cpu(a_format):
    a, b = operands(a_format=a_format)
    got = fp8_linear_by_torch(a, b, torch.float32)
    torch.testing.assert_close(got, reference.fp8_linear(a, b, torch.float32), rtol=1e-5, atol=1e-4)


def test_torch_says_what_it_does_not_cover():
    with pytest.raises(Uncovered, match="blocks on a GPU only"):
        fp8_linear_by_torch(*operands(recipe="blockwise"), torch.float32)
    with pytest.raises(Uncovered, match="33 x 160 is no multiple of 16"):
        fp8_linear_by_torch(*operands(n=33), torch.float32)


shapes = pytest.mark.parametrize("shape", [(1, 16, 16), (40, 100, 24), (130, 300, 260)])


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("recipe", "a_format"), [("tensorwise", E4M3), ("tensorwise", E5M2), ("blockwise", E4M3), ("both rows", E4M3)]
)
def test_the_triton_product(shape, dtype, recipe, a_format):
    """Forward, the gradient of x (tensorwise e5m2), and that of a weight, whose operands both have scales by row."""
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, k, generator=generator).to(DEVICE) for rows in (m, n))
    if recipe == "both rows":
        a, b = (fp8_quantize(each, "blockwise", E4M3)[0] for each in (x, w))
    else:
        a, b = fp8_quantize(x, recipe, a_format)[0], fp8_quantize_weight(w, recipe, E4M3)
    got, want = triton.fp8_linear(a, b, dtype), reference.fp8_linear(a, b, torch.float32)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}[dtype]
    assert got.dtype == dtype
    assert (got.float() - want).abs().max() <= rounding * want.abs().max()


def test_the_triton_product_gives_a_row_the_same_bits_alone():
    a, b = operands(m=130, recipe="blockwise")
    alone = Quantized(a.data[77:78].contiguous(), a.scale_inv[77:78].contiguous())
    whole, one = (triton.fp8_linear(_there(x), _there(b), torch.float32) for x in (a, alone))
    assert torch.equal(whole[77:78], one)


def _there(x):
    return Quantized(x.data.to(DEVICE), x.scale_inv.to(DEVICE))


def test_scales_lie_as_cublas_reads_them():
    """torch's own check of them: (1, m) strides; whole columns of squares, filled up to four."""
    a, b = operands(m=48, k=160, n=288, recipe="blockwise")
    assert scales(a).shape == (48, 2) and scales(a).stride() == (1, 48) and torch.equal(scales(a), a.scale_inv)
    assert scales(b).shape == (4, 3) and scales(b).stride() == (1, 4) and torch.equal(scales(b)[:2], b.scale_inv.t())


def test_more_rows_change_no_product():
    a, b = operands(m=5, k=160, recipe="blockwise")
    more = padded(a, 11)
    assert more.data.shape == (16, 160)
    want = reference.fp8_linear(a, b, torch.float32)
    torch.testing.assert_close(reference.fp8_linear(more, b, torch.float32)[:5], want, rtol=1e-6, atol=1e-6)
