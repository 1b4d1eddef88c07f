"""The Triton gated RMSNorm against plain torch in its dtype and in fp64; a group over two ranks against one."""

# t rows, g groups, w columns of a group

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from tiny.accuracy import DEVICE, assert_as_exact_as, randn, value_and_gradients

from prism_kernels import interpreter
from prism_kernels.backends import Uncovered
from prism_kernels.norm import reference
from prism_kernels.norm.triton import gated_rms_norm

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
EPS = 1e-5


def plain(groups):
    def run(y, z, weight):
        acc = torch.promote_types(y.dtype, torch.float32)
        gated = (y.to(acc) * F.silu(z.to(acc))).unflatten(-1, (groups, -1))
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + EPS)
        return (weight * normed.flatten(-2)).to(y.dtype)

    return run


def normed(groups, group=None, op=gated_rms_norm):
    return lambda y, z, weight: op(y, z, weight, EPS, groups, group)


def inputs_of(t, d, dtype):
    return [x.to(DEVICE) for x in (randn(t, d, dtype=dtype), randn(t, d, dtype=dtype), randn(d, dtype=dtype))]


@dtypes
@pytest.mark.parametrize(("t", "groups", "w"), [(1, 1, 64), (37, 3, 40), (5, 1, 2100), (9, 2, 1024)])
def test_values_and_gradients(t, groups, w, dtype):
    torch.manual_seed(0)
    inputs = inputs_of(t, groups * w, dtype)
    assert_as_exact_as(normed(groups), plain(groups), inputs)


def test_weight_gradient_over_many_rows_repeats_to_the_bit():
    torch.manual_seed(0)
    inputs = inputs_of(301, 48, torch.bfloat16)
    inputs[2] = inputs[2].float()
    upstream = randn(301, 48, dtype=torch.bfloat16).to(DEVICE)
    first, again = (value_and_gradients(normed(2), inputs, upstream) for _ in range(2))
    exact = value_and_gradients(normed(2, op=reference.gated_rms_norm), [x.double() for x in inputs], upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.testing.assert_close(first[3], exact[3].float(), rtol=1e-5, atol=1e-4)  # summed in fp32, not in bf16


@pytest.mark.parametrize(("offset", "width"), [(0, 72), (3, 71)])  # z's rows: 8 elements apart, and not at all aligned
def test_z_is_read_where_the_projection_put_it(offset, width):
    torch.manual_seed(0)
    y, _, weight = inputs_of(9, 48, torch.bfloat16)
    z = randn(9, width, dtype=torch.bfloat16).to(DEVICE)[:, offset : offset + 48]
    upstream = randn(9, width, dtype=torch.bfloat16).to(DEVICE)[:, :48]
    results = []
    for gate, grad in ((z, upstream), (z.contiguous(), upstream.contiguous())):
        leaves = [y.requires_grad_(), gate.detach().requires_grad_(), weight.requires_grad_()]
        out = normed(3)(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def rank_of_a_spanning_group(groups, y, z, weight, upstream):
    if interpreter.active():
        interpreter.install()
    y, z, weight, upstream = (
        x.chunk(groups.tp_size, -1)[groups.tp_rank].contiguous() for x in (y, z, weight, upstream)
    )
    return value_and_gradients(normed(1, groups.tp), [y, z, weight], upstream)


@pytest.mark.skipif(DEVICE == "cuda", reason="the ranks of the tests run on CPUs")
def test_a_group_over_two_ranks_is_one_group():
    torch.manual_seed(0)
    inputs = inputs_of(7, 96, torch.float32)
    upstream = randn(7, 96, dtype=torch.float32)
    exact = value_and_gradients(plain(1), [x.double() for x in inputs], upstream)
    ranks = run_ranks(2, rank_of_a_spanning_group, *inputs, upstream, tp=2)
    for i, whole in enumerate(exact):
        parts = torch.cat([results[i] for results in ranks], -1)
        torch.testing.assert_close(parts, whole.float(), rtol=1e-5, atol=1e-5)


def test_no_rows():
    y, z, weight = (torch.empty(n, device=DEVICE, requires_grad=True) for n in ((0, 48), (0, 48), (48,)))
    out = gated_rms_norm(y, z, weight, EPS, 2)
    grads = torch.autograd.grad(out.sum(), (y, z, weight))
    assert out.shape == grads[0].shape == (0, 48)
    assert torch.equal(grads[2], torch.zeros(48, device=DEVICE))


def test_what_the_kernel_does_not_cover_is_named():
    y, weight = randn(2, 48).to(DEVICE), torch.ones(48, device=DEVICE)
    with pytest.raises(Uncovered, match="y is float64"):
        gated_rms_norm(y, y, weight, EPS, 1)
    with pytest.raises(ValueError, match="48 channels do not split into num_groups=5 equal groups"):
        gated_rms_norm(y.float(), y.float(), weight, EPS, 5)
    wide = torch.empty(1, 20000, device=DEVICE)
    with pytest.raises(Uncovered, match="groups of 10000 columns: at most 8192"):
        gated_rms_norm(wide, wide, wide[0], EPS, 2)
