"""The Triton rotary embedding against the reference, queries and keys as they lie in a fused buffer."""

# t packed tokens, h heads, hk key heads, p head_dim

import pytest
import torch
from tiny.accuracy import DEVICE, assert_as_exact_as, randn

from prism_kernels.backends import Uncovered
from prism_kernels.rope import reference, triton
from prism_kernels.rope.angles import rope_table

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def table(t, p):
    return [x.to(DEVICE) for x in rope_table(torch.arange(t) * 37 % 11, p, 100.0)]


@dtypes
@pytest.mark.parametrize("shape", [(1, 4, 1, 8), (37, 3, 1, 16), (5, 4, 2, 80)])  # 80: half a head is no power of two
def test_values_and_gradients(shape, dtype):
    torch.manual_seed(0)
    t, h, hk, p = shape
    inputs = [randn(t, heads, p, dtype=dtype).to(DEVICE) for heads in (h, hk)]
    cos, sin = table(t, p)

    def plain(q, k):
        def turn(x):
            a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
            c, s = cos[:, None, : p // 2], sin[:, None, p // 2 :]
            return torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)

        return torch.cat([turn(q), turn(k)], 1)

    assert_as_exact_as(lambda q, k: torch.cat(triton.rope(q, k, cos, sin), 1), plain, inputs)


def test_many_programs_equal_the_reference():
    torch.manual_seed(0)
    q, k = randn(20, 4, 128, dtype=torch.float32).to(DEVICE), randn(20, 2, 128, dtype=torch.float32).to(DEVICE)
    args = (q, k, *table(20, 128))  # 3 blocks of 32 rows of q, the last one not full, 2 of k
    torch.testing.assert_close(triton.rope(*args), reference.rope(*args), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pad", [0, 3])  # aligned to 16 bytes, and not at all
def test_heads_of_a_fused_buffer_are_read_where_they_lie(pad):
    torch.manual_seed(0)
    fused = randn(6, 2, 4 * 16 + pad, dtype=torch.bfloat16).to(DEVICE)
    q, k = fused[:, :, 16:32], fused[:, :, pad : pad + 16]
    upstream = fused[:, :, 32:48], fused[:, :, 48:64].transpose(1, 2).contiguous().transpose(1, 2)
    results = []
    for inputs, grads in (((q, k), upstream), ((q.contiguous(), k.contiguous()), [g.contiguous() for g in upstream])):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = triton.rope(*leaves, *table(6, 16))
        results.append([*out, *torch.autograd.grad(out, leaves, grads)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_the_kernel_does_not_cover_is_named():
    q = randn(2, 1, 8).to(DEVICE)
    with pytest.raises(Uncovered, match="q is float64"):
        triton.rope(q, q, *table(2, 8))
    with pytest.raises(Uncovered, match="head_dim 7: needs an even one"):
        triton.rope(q[..., :7].float(), q[..., :7].float(), *table(2, 8))
    with pytest.raises(Uncovered, match=r"tables of torch\.float64"):
        triton.rope(q.float(), q.float(), *(x.double() for x in table(2, 8)))
