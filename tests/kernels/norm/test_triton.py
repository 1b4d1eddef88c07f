"""The Triton RMSNorm, with and without the residual sum, against plain torch in its dtype and in fp64."""

# t rows, d columns

import pytest
import torch
from tiny.accuracy import DEVICE, assert_as_exact_as, randn, value_and_gradients

from prism_kernels import backends
from prism_kernels.backends import Uncovered
from prism_kernels.norm import reference, triton

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
SHAPES = {"several rows a program": (5, 3, 33), "one token": (1, 1, 64), "a row a program": (5, 2100)}
EPS = 1e-5


def plain_norm(x, weight):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def both(norm):
    """normed and h of a function as one tensor."""
    return lambda *a: torch.stack(norm(*a))


def inputs_of(*shape, dtype, branch=False):
    tensors = [randn(*shape, dtype=dtype) for _ in range(2 if branch else 1)]
    return [x.to(DEVICE) for x in [*tensors, randn(shape[-1], dtype=dtype)]]


@dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_norm(shape, dtype):
    torch.manual_seed(0)
    inputs = inputs_of(*shape, dtype=dtype)
    assert_as_exact_as(lambda x, w: triton.rms_norm(x, w, EPS), plain_norm, inputs)


@dtypes
@pytest.mark.parametrize("alpha", [1.0, 0.22])
def test_sum_and_norm(alpha, dtype):
    torch.manual_seed(0)

    def plain(x, branch, weight):
        h = torch.add(x, branch, alpha=alpha)
        return plain_norm(h, weight), h

    inputs = inputs_of(5, 1, 200, dtype=dtype, branch=True)
    assert_as_exact_as(both(lambda x, b, w: triton.add_rms_norm(x, b, alpha, w, EPS)), both(plain), inputs)


def test_the_sum_is_rounded_before_it_is_normalised():
    torch.manual_seed(0)
    x, branch, weight = inputs_of(64, 96, dtype=torch.bfloat16, branch=True)
    normed, h = triton.add_rms_norm(x, branch, 0.22, weight, EPS)
    torch.testing.assert_close(h, (x.float() + 0.22 * branch.float()).bfloat16(), rtol=2**-7, atol=0)
    assert torch.equal(normed, triton.rms_norm(h, weight, EPS))


def test_a_wide_row_is_read_twice_with_the_same_result(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(triton, "WIDEST_BACKWARD", 1024)  # rows of 3000 take two blocks of columns

    def plain(x, branch, weight):
        h = torch.add(x, branch, alpha=0.22)
        return plain_norm(h, weight), h

    for dtype in (torch.float32, torch.bfloat16):
        inputs = inputs_of(21, 3000, dtype=dtype, branch=True)  # 6 blocks of rows for 2 programs in the interpreter
        assert_as_exact_as(both(lambda x, b, w: triton.add_rms_norm(x, b, 0.22, w, EPS)), both(plain), inputs)
        assert_as_exact_as(lambda x, w: triton.rms_norm(x, w, EPS), plain_norm, [inputs[0], inputs[2]])


def test_weight_gradient_over_many_rows_repeats_to_the_bit():
    torch.manual_seed(0)
    inputs = inputs_of(301, 40, dtype=torch.bfloat16)
    assert_as_exact_as(lambda x, w: triton.rms_norm(x, w, EPS), plain_norm, inputs)
    upstream = randn(301, 40, dtype=torch.bfloat16).to(DEVICE)
    first, again = (value_and_gradients(lambda x, w: triton.rms_norm(x, w, EPS), inputs, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(("offset", "width"), [(8, 72), (3, 71)])  # aligned to 16 bytes, and not at all
def test_columns_of_a_wider_buffer_are_read_where_they_lie(offset, width):
    torch.manual_seed(0)
    weight = randn(24, dtype=torch.bfloat16).to(DEVICE)
    wide = [randn(9, 1, width, dtype=torch.bfloat16).to(DEVICE)[..., offset : offset + 24] for _ in range(4)]
    strided, packed = ([x.detach().requires_grad_() for x in xs] for xs in (wide[:2], [x.contiguous() for x in wide]))
    results = []
    for x, branch in (strided, packed[:2]):
        outputs = triton.add_rms_norm(x, branch, 0.5, weight, EPS)
        grads = torch.autograd.grad(outputs, (x, branch), wide[2:] if x is strided[0] else [*packed[2:]])
        results.append([*outputs, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_fp32_weight_keeps_a_bf16_input_from_being_rounded_again():
    torch.manual_seed(0)
    x, weight = inputs_of(7, 48, dtype=torch.bfloat16)
    ours, theirs = (f(x, weight.float(), EPS) for f in (triton.rms_norm, reference.rms_norm))
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)


def test_no_rows():
    x, weight = torch.empty(0, 1, 48, device=DEVICE, requires_grad=True), torch.ones(48, device=DEVICE)
    weight.requires_grad_()
    out = triton.rms_norm(x, weight, EPS)
    grads = torch.autograd.grad(out, (x, weight), torch.empty_like(out))
    assert out.shape == grads[0].shape == (0, 1, 48)
    assert torch.equal(grads[1], torch.zeros(48, device=DEVICE))


def test_what_the_kernel_does_not_cover_goes_to_the_reference(caplog):
    x, weight = randn(3, 8).to(DEVICE), randn(8).to(DEVICE)
    with pytest.raises(Uncovered, match="x is float64: needs bf16, fp16 or fp32"):
        triton.rms_norm(x, weight, EPS)
    with pytest.raises(Uncovered, match="differ"):
        triton.add_rms_norm(x.float(), x.bfloat16(), 1.0, weight.float(), EPS)
    with pytest.raises(Uncovered, match="40000 columns: at most 32768"):
        triton.rms_norm(x.float().new_empty(1, 40000), weight.float(), EPS)
    assert torch.equal(backends.function("rms_norm", "triton")(x, weight, EPS), reference.rms_norm(x, weight, EPS))
    assert "rms_norm: x is float64" in caplog.text
