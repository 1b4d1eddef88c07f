"""The Triton quantisers against the reference: the same FP8 numbers and scales, to the bit."""

import math

import pytest
import torch
from tiny.accuracy import DEVICE

from prism_kernels.activation import triton as activation
from prism_kernels.backends import Uncovered
from prism_kernels.fp8 import E4M3, E5M2
from prism_kernels.norm import triton as norm
from prism_kernels.quantize import reference, triton

recipes = pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
formats = pytest.mark.parametrize("dtype", [E4M3, E5M2])
# One number, less than a tile, whole tiles, and tiles with a rest both ways.
shapes = pytest.mark.parametrize("shape", [(1, 1), (7, 40), (128, 256), (130, 300)])


def matrix(shape, of=torch.bfloat16):
    spread = 10 ** torch.linspace(-4, 3, shape[1])
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * spread).to(of).to(DEVICE)


def assert_same(got, want):
    assert (got is None) == (want is None)
    if want is not None:
        assert got.data.dtype == want.data.dtype and got.data.is_contiguous()
        assert torch.equal(got.data.view(torch.uint8).cpu(), want.data.view(torch.uint8).cpu())
        assert torch.equal(got.scale_inv.cpu(), want.scale_inv.cpu())


@shapes
@recipes
@formats
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16])
def test_rows_and_columns(shape, recipe, dtype, of):
    x = matrix(shape, of)
    for columns in (True, False):
        got, want = (each.fp8_quantize(x, recipe, dtype, columns=columns) for each in (triton, reference))
        for ours, theirs in zip(got, want, strict=True):
            assert_same(ours, theirs)


@shapes
@recipes
def test_weights_and_their_transposes(shape, recipe):
    weight = matrix(shape)
    for w in (weight, weight.t()):
        assert_same(triton.fp8_quantize_weight(w, recipe, E4M3), reference.fp8_quantize_weight(w, recipe, E4M3))


@formats
def test_every_number_of_a_format_and_between_two(dtype):
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = numbers[numbers.isfinite()]
    between = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, numbers * 1.0001])
    x = between[: len(between) // 16 * 16].view(-1, 16).to(DEVICE)
    amax = torch.tensor(reference.LARGEST[dtype], device=DEVICE)  # scale 1
    assert_same(*(each.fp8_quantize(x, "tensorwise", dtype, amax)[0] for each in (triton, reference)))


@recipes
@pytest.mark.parametrize("value", [0.0, math.inf, -math.inf, math.nan, 1e-44])
def test_zero_infinite_undefined_and_tiny_numbers(recipe, value):
    x = matrix((140, 150), torch.float32)
    x[3, 4] = value
    x[100:] = value
    for ours, theirs in zip(*(each.fp8_quantize(x, recipe, E4M3) for each in (triton, reference)), strict=True):
        assert torch.equal(ours.scale_inv, theirs.scale_inv)
        undefined = theirs.data.float().isnan()
        assert torch.equal(ours.data.float().isnan(), undefined)
        assert torch.equal(ours.data.float()[~undefined], theirs.data.float()[~undefined])


def test_the_largest_magnitude():
    for x in (matrix((300, 1100)), matrix((3, 5)), matrix((3, 5)).t(), torch.zeros(0, 4, device=DEVICE)):
        assert triton.fp8_amax(x) == reference.fp8_amax(x)
    x = matrix((40, 50))
    x[39, 49] = math.nan
    assert triton.fp8_amax(x).isnan()
    x[39, 49] = -math.inf
    assert triton.fp8_amax(x) == math.inf


@recipes
def test_columns_of_a_wider_buffer_are_read_where_they_lie(recipe):
    x = matrix((130, 400))[:, 24:200]
    for ours, theirs in zip(*(each.fp8_quantize(x, recipe, E4M3) for each in (triton, reference)), strict=True):
        assert_same(ours, theirs)


def test_what_is_not_covered():
    with pytest.raises(Uncovered, match="x is float64"):
        triton.fp8_quantize(torch.ones(2, 2, dtype=torch.float64, device=DEVICE), "blockwise", E4M3)


def near(ours, theirs):
    """A producer's last bits differ between libraries, which moves a number at most to its neighbour in FP8."""
    assert ours.data.shape == theirs.data.shape
    got, want = ours.dequantized(torch.float32).cpu(), theirs.dequantized(torch.float32).cpu()
    assert ((got - want).abs() <= 0.13 * want.abs() + theirs.scale_inv.max().cpu() * 2**-9).all()


def both(made):
    return made.rows, made.columns


@recipes
@pytest.mark.parametrize("shape", [(1, 16), (130, 300)])
@pytest.mark.parametrize("added", [False, True])
def test_a_norm_is_quantised_where_it_is_computed(shape, recipe, added):
    """To the bit what the kernel of the norm by itself gives, and nearly what torch does; its gradients, too."""
    weight = (torch.rand(shape[1], generator=torch.Generator().manual_seed(1)) + 0.5).bfloat16().to(DEVICE)
    x, branch = matrix(shape), matrix(shape).flip(0) if added else None
    inputs = [each.requires_grad_() for each in (x, branch, weight) if each is not None]
    made, h = triton.rms_norm_quantize(x, branch, 0.5, weight, 1e-5, recipe)
    normed, want_h = norm.add_rms_norm(x, branch, 0.5, weight, 1e-5) if added else (norm.rms_norm(x, weight, 1e-5), x)
    assert torch.equal(h, want_h) and made.x.shape == normed.shape
    for ours, theirs in zip(both(made), reference.fp8_quantize(normed.detach(), recipe, E4M3), strict=True):
        assert_same(ours, theirs)
    plain, _ = reference.rms_norm_quantize(x, branch, 0.5, weight, 1e-5, recipe)
    for ours, theirs in zip(both(made), both(plain), strict=True):
        near(ours, theirs)
    upstream = [matrix(shape).flip(1), matrix(shape)][: 1 + added]
    for ours, theirs in zip(
        torch.autograd.grad([made.x, h][: 1 + added], inputs, upstream),
        torch.autograd.grad([normed, want_h][: 1 + added], inputs, upstream),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@recipes
@pytest.mark.parametrize("shape", [(1, 16), (130, 300)])
@pytest.mark.parametrize("op", ["swiglu", "squared_relu"])
def test_an_activation_is_quantised_where_it_is_computed(shape, recipe, op):
    factor = 2 if op == "swiglu" else 1
    x = (torch.randn(shape[0], factor * shape[1], generator=torch.Generator().manual_seed(2)) * 3).bfloat16().to(DEVICE)
    x.requires_grad_()
    made, by_itself = getattr(triton, f"{op}_quantize")(x, recipe), getattr(activation, op)(x)
    assert made.x.shape == by_itself.shape
    for ours, theirs in zip(both(made), reference.fp8_quantize(by_itself.detach(), recipe, E4M3), strict=True):
        assert_same(ours, theirs)
    for ours, theirs in zip(both(made), both(getattr(reference, f"{op}_quantize")(x, recipe)), strict=True):
        near(ours, theirs)
    ours, theirs = (torch.autograd.grad(y, x, matrix(shape))[0] for y in (made.x, by_itself))
    assert torch.equal(ours, theirs)


def ranks_agree(amax):
    amax.fill_(448.0)


def test_ranks_agree_on_an_amax_before_they_cast():
    x = matrix((16, 64))
    weight = torch.ones(64, dtype=torch.bfloat16, device=DEVICE)
    for each in (triton, reference):
        normed, _ = each.rms_norm_quantize(x, None, 0.0, weight, 1e-5, "tensorwise", ranks_agree)
        activated = each.squared_relu_quantize(x, "tensorwise", ranks_agree)
        assert normed.rows.scale_inv == activated.rows.scale_inv == 1
