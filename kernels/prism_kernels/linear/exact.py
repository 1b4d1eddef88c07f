"""Matrix products and sums over ranks whose bits do not depend on how many rows or ranks' messages go with them.

oneDNN (fp32 and bf16) and MKL choose their code, and with it the order of a row's sums, by the number of rows: one row
differs from the same row among others, in MKL two and three do, and with two threads five, seven and nine. Multiples of
eight rows never did, over 1 to 4,096 rows, any offset and one to four threads; in batched products multiples of four
did not, except one matrix alone of 24 columns with three threads (tests/kernels/test_exact.py). Where the processor has
AMX (Xeons since 2023) multiples of eight do in bf16, where 512 terms and more are added, not 448: there every product
is one of 64 rows, so that the code that is chosen is one, too.
"""

# m rows, k summed over, n columns

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from prism_kernels import matmul
from prism_kernels.precision import accumulate_dtype

ROWS = 8
BATCHED_ROWS = 4  # of each matrix of a batched product
AMX = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()  # not public: its absence is not an error
AMX_TERMS, AMX_ROWS = 256, 64  # sums of more terms in bf16 are taken for so many rows at a time


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b [k, n], each row the same bits with whatever other rows; no autograd."""
    if AMX and a.dtype == torch.bfloat16 and a.device.type == "cpu" and a.shape[1] > AMX_TERMS:
        blocks = F.pad(a, (0, 0, 0, -len(a) % AMX_ROWS)).split(AMX_ROWS)
        return torch.cat([torch.mm(block, b) for block in blocks])[: len(a)]
    missing = -len(a) % ROWS
    padded = F.pad(a, (0, 0, 0, missing)) if missing else a
    if matmul.ONEDNN is not None and a.dtype == torch.float32 and a.device.type == "cpu":
        y = matmul.ONEDNN(padded, b.t(), None, "none", [], "")  # at every size: another library is another rounding
    else:
        y = torch.mm(padded, b)
    return y[: len(a)] if missing else y


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a [b, m, k] @ b [b, k, n], each row the same bits with whatever other rows and matrices; no autograd."""
    m, missing = a.shape[1], -a.shape[1] % BATCHED_ROWS
    if missing:
        a = F.pad(a, (0, 0, 0, missing))
    if len(a) == 1 and torch.get_num_threads() > 1:  # a matrix alone is cut over threads
        return torch.bmm(a.expand(2, -1, -1), b.expand(2, -1, -1))[:1, :m]
    y = torch.bmm(a, b)
    return y[:, :m] if missing else y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return mm(x.flatten(0, -2), weight.t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = matmul.mm(rows, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight = matmul.mm(rows.t(), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., k] @ weight [n, k].T, differentiable; each row the same bits with whatever other rows."""
    return _Linear.apply(x, weight)


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of every rank's x, added in rank order in the accumulation dtype; no autograd.

    gloo's all-reduce over more than two ranks adds in an order that depends on the size of the message.
    """
    if group is None or dist.get_world_size(group) == 1:
        return x
    parts = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather_into_tensor(parts.view(-1, *x.shape[1:]), x.contiguous(), group=group)
    total = parts[0].to(accumulate_dtype(x.dtype), copy=True)
    for part in parts[1:]:
        total += part
    return total.to(x.dtype)
