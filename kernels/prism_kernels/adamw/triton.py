"""AdamW over many flat tensors in one launch: weights, moments and gradients read once, bf16 copies written too."""

# n tensors, e their elements

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.backends import Uncovered
from prism_kernels.rows import check_dtypes

BLOCK = 2048  # elements of a program: 16 of each of four tensors per thread, no spills (compile report, not measured)


@triton.jit
def place(first, offsets, tensor, ALIGNED: tl.constexpr):
    """Where the given tensor starts: offsets[tensor] elements after `first`; a multiple of 16 bytes where ALIGNED.

    Triton 3.7 makes no wide accesses to an address read from memory, but does to one that is a known pointer plus n.
    """
    offset = tl.load(offsets + tensor)
    if ALIGNED:
        unit: tl.constexpr = 128 // first.dtype.element_ty.primitive_bitwidth
        offset = offset // unit * unit
    return first + offset


@triton.jit
def adamw_kernel(
    first_param,
    first_grad,
    first_exp_avg,
    first_exp_avg_sq,
    first_copy,
    offsets,
    sizes,
    owner,
    index,
    num_tensors,
    decay,
    beta1,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    step_size,
    inverse_root_correction2,
    eps,
    grad_scale,
    COPY: tl.constexpr,
    REMAINDER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i updates block index[i] of tensor owner[i]. offsets [5, n]: of weights, gradients, moments and copies.

    decay = 1 - lr * weight_decay, step_size = lr / (1 - beta1**step). ALIGNED: see `_kind`. REMAINDER: a weight is the
    bits of its copy, 16 zeros behind them, plus an int16, as `remainder.py` has it; copies are then given as int16.
    """
    program = tl.program_id(0)
    tensor = tl.load(owner + program)
    element = tl.load(index + program).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(sizes + tensor)
    here = element < (size // 8 * 8 if ALIGNED else size)
    weights = place(first_param, offsets, tensor, ALIGNED) + element
    grads = place(first_grad, offsets + num_tensors, tensor, ALIGNED) + element
    exp_avgs = place(first_exp_avg, offsets + 2 * num_tensors, tensor, ALIGNED) + element
    exp_avg_sqs = place(first_exp_avg_sq, offsets + 3 * num_tensors, tensor, ALIGNED) + element
    copies = place(first_copy, offsets + 4 * num_tensors, tensor, ALIGNED) + element
    exp_avg = tl.load(exp_avgs, mask=here)
    exp_avg_sq = tl.load(exp_avg_sqs, mask=here)
    if REMAINDER:
        bits = (tl.load(copies, mask=here).to(tl.int32) << 16) + tl.load(weights, mask=here).to(tl.int32)
        bits += tl.where(exp_avg_sq.to(tl.int32, bitcast=True) < 0, 0x10000, 0)  # the upper of two halves
        weight = bits.to(tl.float32, bitcast=True)
        exp_avg_sq = tl.abs(exp_avg_sq)
    else:
        weight = tl.load(weights, mask=here)
    grad = tl.load(grads, mask=here).to(tl.float32) * grad_scale
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    weight = weight * decay - step_size * exp_avg / (tl.sqrt(exp_avg_sq) * inverse_root_correction2 + eps)
    tl.store(exp_avgs, exp_avg, mask=here)
    if REMAINDER:
        bits = weight.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest even
        rest = bits - (rounded << 16)
        squared = exp_avg_sq.to(tl.int32, bitcast=True)
        squared = tl.where(rest == 0x8000, squared | -0x80000000, squared)
        exp_avg_sq = squared.to(tl.float32, bitcast=True)
        tl.store(weights, rest.to(tl.int16), mask=here)
        tl.store(copies, rounded.to(tl.int16), mask=here)
    else:
        tl.store(weights, weight, mask=here)
        if COPY:
            tl.store(copies, weight.to(first_copy.dtype.element_ty), mask=here)
    tl.store(exp_avg_sqs, exp_avg_sq, mask=here)


@functools.lru_cache(maxsize=16)
def _tables(offsets: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """(offsets [5, n] int64, sizes [n] int64, owner [programs] int32, index [programs] int32) on the device.

    Kept while places stay what they are, as they do from step to step: gradients live in one buffer.
    """
    counts = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes])
    owner = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    index = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    tables = torch.tensor(offsets), torch.tensor(sizes), owner.to(torch.int32), index.to(torch.int32)
    return tuple(table.to(device) for table in tables)


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor | None],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
) -> None:
    """One step of AdamW (arXiv 1711.05101, as torch.optim.AdamW), in place; copies receive the new parameters rounded.

    params, exp_avgs, exp_avg_sqs: n fp32 tensors; grads: n of fp32, bf16 or fp16, multiplied by grad_scale (clipping);
    copies: n bf16 or fp16 tensors or Nones. All contiguous. step counts from 1. A param may be an int16 remainder of
    its bf16 copy (`remainder.py`): the two are its fp32 value.
    """
    launches = defaultdict(list)
    for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, copies, strict=True):
        if tensors[0].numel():
            launches[_kind(*tensors)].append(tensors)
    for (has_copy, aligned), members in [(kind[3:], rows) for kind, rows in launches.items()]:
        remainder = members[0][0].dtype == torch.int16
        if remainder:
            members = [(*row[:4], None if row[4] is None else row[4].view(torch.int16)) for row in members]
        # A tensor that gets no copy stands in for its own: never written.
        columns = [
            [row[0] if x is None else x for x, row in zip(column, members, strict=True)]
            for column in zip(*members, strict=True)
        ]
        first = [column[0] for column in columns]
        offsets = tuple(
            tuple((x.data_ptr() - column[0].data_ptr()) // x.element_size() for x in column) for column in columns
        )
        table, sizes, owner, index = _tables(offsets, tuple(x.numel() for x in columns[0]), first[0].device)
        adamw_kernel[(len(owner),)](
            *first,
            table,
            sizes,
            owner,
            index,
            len(members),
            1 - lr * weight_decay,
            *betas,
            1 - betas[0],
            1 - betas[1],
            lr / (1 - betas[0] ** step),
            (1 - betas[1] ** step) ** -0.5,
            eps,
            grad_scale,
            COPY=has_copy,
            REMAINDER=remainder,
            ALIGNED=aligned,
            BLOCK=BLOCK,
            num_warps=4,
        )


def _kind(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, copy: Tensor | None
) -> tuple[torch.dtype, torch.dtype, torch.dtype, bool, bool]:
    """What the tensors of one launch have in common: (param's dtype, gradient's, copy's, is there a copy?, aligned?).

    Aligned: all start at a multiple of 16 bytes and hold a multiple of 8 elements, which makes every access 16 bytes.
    """
    remainder = param.dtype == torch.int16
    if remainder and (copy is None or copy.dtype != torch.bfloat16):
        raise Uncovered("a remainder (int16) needs a bfloat16 copy")
    for name, x in (("param", param), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if x is param and remainder:
            continue
        if x.dtype != torch.float32:
            raise Uncovered(f"{name} is {str(x.dtype).removeprefix('torch.')}: needs float32")
    given = [x for x in (param, grad, exp_avg, exp_avg_sq, copy) if x is not None]
    check_dtypes(grad=grad, copy=given[-1])
    if not all(x.is_contiguous() for x in given):
        raise Uncovered("a tensor is not contiguous")
    aligned = param.numel() % 8 == 0 and all(x.data_ptr() % 16 == 0 for x in given)
    return param.dtype, grad.dtype, given[-1].dtype, copy is not None, aligned


class FusedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW whose step is one launch of `adamw` per parameter group, with torch's state and its names.

    `copies` maps a parameter to the bf16 tensor of the model that is to follow it. `grad_scale` multiplies the
    gradients of the next step and is 1 again after it: clipping without a pass of its own.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        copies: dict[Tensor, Tensor] | None = None,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, foreach=False, fused=False)
        self.copies = copies or {}
        self.grad_scale = 1.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for step, members in self._by_step(params).items():
                adamw(
                    members,
                    [param.grad for param in members],
                    [self.state[param]["exp_avg"] for param in members],
                    [self.state[param]["exp_avg_sq"] for param in members],
                    [self.copies.get(param) for param in members],
                    step=step,
                    lr=float(group["lr"]),
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    grad_scale=self.grad_scale,
                )
        self.grad_scale = 1.0
        return loss

    def _by_step(self, params: list[Tensor]) -> dict[int, list[Tensor]]:
        """The parameters by the number of the step each is about to take, its state made where there is none."""
        by_step = defaultdict(list)
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
            state["step"] += 1
            by_step[int(state["step"])].append(param)
        return by_step
