"""Quantising to FP8: scales are powers of two, numbers the nearest of the format, and what is no number stays one."""

import math

import pytest
import torch

from prism_kernels.fp8 import BLOCK, E4M3, E5M2, LARGEST, Quantized, power_of_two_scale
from prism_kernels.quantize.reference import cast, fp8_amax, fp8_quantize, fp8_quantize_weight

FORMATS = [E4M3, E5M2]


def nearest(x, dtype):
    """The nearest number of the format, searched among all, ties to the even mantissa; at most the largest."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    finite = numbers[numbers.isfinite()]
    codes = torch.arange(256)[numbers.isfinite()]
    distance = (x.double().clamp(-LARGEST[dtype], LARGEST[dtype])[:, None] - finite).abs()
    tied = distance == distance.min(1, keepdim=True).values
    even = tied & (codes % 2 == 0)
    return torch.stack([finite[(even if even[i].any() else tied)[i]][0] for i in range(len(x))])


@pytest.mark.parametrize("dtype", FORMATS)
def test_cast_takes_the_nearest_number(dtype):
    x = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-6, 6, 400)
    between = (torch.arange(0, 120, dtype=torch.uint8).view(dtype).float() * 1.0625).clamp(max=LARGEST[dtype])
    x = torch.cat([x, between, torch.tensor([0.0, LARGEST[dtype], 1e30, -1e30, math.inf, -math.inf])])
    assert torch.equal(cast(x, dtype).double(), nearest(x, dtype))
    assert cast(torch.tensor([math.nan]), dtype).isnan().all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_scales_are_powers_of_two_that_fill_the_format(dtype):
    amax = torch.cat([torch.rand(1000) * 2.0**e for e in range(-60, 60, 5)]).clamp(min=1e-30)
    scale = power_of_two_scale(amax, dtype)
    assert torch.equal(scale.log2(), scale.log2().round())
    assert (amax * scale <= LARGEST[dtype]).all() and (amax * scale > LARGEST[dtype] / 2).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_scales_where_there_is_no_largest(dtype):
    odd = torch.tensor([0.0, math.inf, math.nan])
    assert power_of_two_scale(odd, dtype).tolist() == [1.0, 1.0, 1.0]
    tiny = torch.tensor(torch.finfo(torch.float32).smallest_normal / 4)
    assert power_of_two_scale(tiny, dtype) == 2.0**127  # the quotient overflows: the largest power of two


def in_six_lines(x, dtype):
    """Transformer Engine's current scaling with powers of two, as its reference quantiser has it."""
    amax = x.float().abs().max()
    scale = torch.tensor(LARGEST[dtype]) / amax
    scale = torch.ldexp(torch.ones(()), torch.frexp(scale).exponent - 1)
    data = (x.float() * scale).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)
    return data, 1 / scale


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16])
def test_tensorwise_is_transformer_engines(dtype, of):
    x = (torch.randn(37, 50, generator=torch.Generator().manual_seed(1)) * 3).to(of)
    rows, columns = fp8_quantize(x, "tensorwise", dtype)
    data, scale_inv = in_six_lines(x, dtype)
    assert torch.equal(rows.data.float(), data.float()) and rows.scale_inv == scale_inv == columns.scale_inv
    assert torch.equal(columns.data.float(), data.float().t()) and columns.data.is_contiguous()
    weight = fp8_quantize_weight(x.t(), "tensorwise", dtype)
    assert torch.equal(weight.data.float(), data.float().t()) and weight.scale_inv == scale_inv


def test_an_amax_that_is_given_is_the_scale():
    """A tensor-parallel rank scales its shard by the whole tensor's."""
    x = torch.randn(16, 32)
    whole = fp8_quantize(x, "tensorwise", E4M3)[0]
    shard = fp8_quantize(x[:, :16], "tensorwise", E4M3, fp8_amax(x))[0]
    assert torch.equal(shard.data.float(), whole.data[:, :16].float()) and shard.scale_inv == whole.scale_inv


@pytest.mark.parametrize("shape", [(1, 1), (5, 128), (130, 300), (256, 256)])
def test_blocks_are_scaled_on_their_own(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 10 ** torch.linspace(-3, 3, shape[1])
    rows, columns = fp8_quantize(x, "blockwise", E4M3)
    weight, transposed = (fp8_quantize_weight(w, "blockwise", E4M3) for w in (x, x.t()))
    for m in range(0, shape[0], 64):
        for k in range(0, shape[1], BLOCK):
            block = x[m, k : k + BLOCK]
            data, scale_inv = in_six_lines(block, E4M3)
            assert torch.equal(rows.data[m, k : k + BLOCK].float(), data.float())
            assert rows.scale_inv[m, k // BLOCK] == scale_inv
    column = x[:BLOCK, 0]
    assert torch.equal(columns.data[0, :BLOCK].float(), in_six_lines(column, E4M3)[0].float())
    tile = x[:BLOCK, :BLOCK]
    assert torch.equal(weight.data[:BLOCK, :BLOCK].float(), in_six_lines(tile, E4M3)[0].float())
    assert torch.equal(transposed.data.float(), weight.data.float().t())
    assert torch.equal(transposed.scale_inv, weight.scale_inv.t())


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_an_error_is_at_most_half_a_step(recipe, dtype):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    rows, columns = fp8_quantize(x, recipe, dtype)
    step = {E4M3: 2**-4, E5M2: 2**-3}[dtype]  # half a step, of 3 and of 2 bits of mantissa
    smallest = rows.scale_inv.max() * {E4M3: 2**-10, E5M2: 2**-17}[dtype]
    for got, want in ((rows, x), (columns, x.t())):
        error = (got.dequantized(torch.float32) - want).abs()
        assert (error <= step * want.abs() + smallest).all()


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_zero_infinite_and_undefined_numbers(recipe, value):
    x = torch.full((3, 140), value)
    x[1] = 2.0 if value else 0.0
    rows, columns = fp8_quantize(x, recipe, E4M3)
    assert torch.isfinite(rows.scale_inv).all() and (rows.scale_inv > 0).all()
    got = rows.dequantized(torch.float32)
    assert torch.equal(got[1], x[1])
    if math.isnan(value):
        assert got[0].isnan().all()
    else:
        assert (got[0] == min(value, 448.0)).all()  # casting saturates; the next product's sum is large, not undefined
    assert torch.equal(columns.dequantized(torch.float32).t().nan_to_num(1e9), got.nan_to_num(1e9))


def test_dequantised_numbers_are_exact_in_bf16():
    x = torch.randn(130, 300) * 1e-3
    for quantized in (*fp8_quantize(x, "blockwise", E4M3), fp8_quantize_weight(x, "blockwise", E4M3)):
        assert torch.equal(quantized.dequantized(torch.bfloat16).float(), quantized.dequantized(torch.float32))


def test_a_whole_tensor_and_its_blocks_can_be_told_apart():
    square = Quantized(torch.ones(BLOCK, BLOCK).to(E4M3), torch.full((1, 1), 2.0))
    assert (square.dequantized(torch.float32) == 2).all()
