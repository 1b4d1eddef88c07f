"""The large linears' products in FP8: quantise both operands, multiply, and the same for either gradient."""

# t packed tokens, k columns, n rows of a weight on this rank

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from prism_kernels.fp8 import E4M3, Copies, Fp8Activation, Quantized, Recipe, gradient_format
from prism_mcore.model.ops import Ops
from prism_mcore.model.state import Decode, Prefill


class Fp8:
    """What all FP8 linears of a model share: the recipe, its ops, and whether it is in force."""

    def __init__(self, recipe: Recipe, ops: Ops, group: dist.ProcessGroup, bf16_ends: int = 0):
        self.recipe, self.bf16_ends = recipe, bf16_ends
        self.group = group  # tensor-parallel
        self.enabled = True
        self.by_te = ops.uses_te("fp8_linear")  # its linears do all of this by themselves
        if not self.by_te:
            self.amax, self.quantize = ops["fp8_amax"], ops["fp8_quantize"]
            self.quantize_weight, self.product = ops["fp8_quantize_weight"], ops["fp8_linear"]
            self.norm_quantize = ops["rms_norm_quantize"]
            self.activations = {op: ops[f"{op}_quantize"] for op in ("swiglu", "squared_relu")}
        self.generating: type[Prefill] | type[Decode] | None = None
        self.kept: dict[Fp8Product, Quantized] = {}  # weights as the newest prefill found them
        self.gradient = gradient_format(recipe)

    def covers(self, layer: int, num_layers: int) -> bool:
        """Is this sub-layer of so many in FP8? The first and last `bf16_ends` are not."""
        return self.bf16_ends <= layer < num_layers - self.bf16_ends

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, products are those of `precision.dtype`: what the weights are worth without FP8."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def norm(
        self, x: Tensor, branch: Tensor | None, alpha: float, weight: Tensor, eps: float
    ) -> tuple[Fp8Activation, Tensor]:
        """(rms_norm(h) in FP8, h) for h = x + alpha * branch, or x; every rank has all tokens."""
        return self.norm_quantize(x, branch, alpha, weight, eps, self.recipe, None, torch.is_grad_enabled())

    def activation(self, op: str, x: Tensor) -> Fp8Activation:
        """swiglu(x) or squared_relu(x) in FP8; ranks have a part of its columns each."""
        return self.activations[op](x, self.recipe, self.reduce_amax, torch.is_grad_enabled())

    def all_tokens(self, x: Tensor | Fp8Activation, sequence_parallel: bool) -> Any:
        """What a column-parallel product reads, [t, 1, k] on every rank; its gradients are summed over ranks."""
        if isinstance(x, Fp8Activation):
            assert not sequence_parallel, "it is quantised after it was gathered"
            return replace(x, x=copy_to_tensor_model_parallel_region(x.x, group=self.group))
        if sequence_parallel:
            return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.group)
        return copy_to_tensor_model_parallel_region(x, group=self.group)

    @contextmanager
    def step(self, step: Prefill | Decode) -> Iterator[None]:
        """Inside, a pass of generation: a prefill keeps the weights it quantised for the decoding steps after it."""
        before, self.generating = self.generating, type(step)
        try:
            yield
        finally:
            self.generating = before

    def one_share(self, grad: Tensor, replicated: int) -> Tensor:
        """Of the last columns of a gradient [t, n], partial on every rank, the sum; each rank has its share of it.

        Quantised sums are not sums of quantised parts: without, a model with one SSM group would train otherwise in
        every layout.
        """
        if not replicated or self.group.size() == 1:
            return grad
        total = grad[:, -replicated:].contiguous()
        dist.all_reduce(total, group=self.group)
        grad, share = grad.clone(), range(self.group.rank(), replicated, self.group.size())
        grad[:, -replicated:] = 0
        columns = torch.arange(share.start, share.stop, share.step, device=grad.device)
        grad[:, columns - replicated] = total[:, columns]
        return grad

    def whole_amax(self, x: Tensor, sharded: bool) -> Tensor | None:
        """The amax that a tensorwise scale follows from, of the whole tensor where this is a rank's shard of it."""
        if self.recipe == "blockwise":
            return None
        amax = self.amax(x)
        if sharded:
            self.reduce_amax(amax)
        return amax

    def reduce_amax(self, amax: Tensor) -> None:
        """The largest over ranks, in place."""
        if self.group.size() > 1:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=self.group)


class Fp8Product:
    """The product in FP8 under one linear.

    parallel: "column", where ranks hold other rows of the weight, or "row", where they hold other columns. replicated:
    last rows of a column-parallel weight that every rank holds, and whose gradients ranks will add.
    """

    def __init__(self, fp8: Fp8, parallel: str, replicated: int = 0):
        self.fp8, self.row_parallel, self.replicated = fp8, parallel == "row", replicated

    @property
    def enabled(self) -> bool:
        return self.fp8.enabled

    def __call__(self, x: Tensor | Fp8Activation, weights: list[Tensor]) -> Tensor:
        """x [t, 1, k] times weights of n rows together, [n, k] -> [t, 1, n]; the caller gathers and adds over ranks."""
        made = (x.rows, x.columns) if isinstance(x, Fp8Activation) else None
        x = x.x if isinstance(x, Fp8Activation) else x
        return _Linear.apply(x, self, made, torch.is_grad_enabled(), *weights)

    def quantized(self, x: Tensor, columns: bool) -> Copies:
        """x [t, 1, k] and, with `columns`, its transpose."""
        rows = x.flatten(0, -2)
        amax = self.fp8.whole_amax(rows, sharded=self.row_parallel)
        return self.fp8.quantize(rows, self.fp8.recipe, E4M3, amax, columns=columns)

    def weight(self, weights: Sequence[Tensor]) -> tuple[Quantized, Tensor | None]:
        """[n, k], and its amax where that is tensorwise.

        A decoding step reads what the prefill before it kept: weights do not change in between. Kept in place, so that
        a captured decoding step reads it, too.
        """
        fp8, kept = self.fp8, self.fp8.kept.get(self)
        if fp8.generating is Decode and kept is not None:
            return kept, None
        weight = _together(weights)
        amax = fp8.whole_amax(weight, sharded=True)
        quantized = fp8.quantize_weight(weight, fp8.recipe, E4M3, amax)
        if fp8.generating is Prefill:
            if kept is None:
                with torch.inference_mode(False):  # else it could only be written in inference mode
                    kept = Quantized(torch.empty_like(quantized.data), torch.empty_like(quantized.scale_inv))
                fp8.kept[self] = kept
            kept.data.copy_(quantized.data)
            kept.scale_inv.copy_(quantized.scale_inv)
        return quantized, amax


class _Linear(torch.autograd.Function):
    """Keeps x in FP8, scaled along the tokens that the weight's gradient sums over; weights are quantised again in
    backward instead of kept: all of them at once would be a byte a parameter.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, linear: Fp8Product, made: Copies | None, training: bool, *weights: Tensor
    ) -> Tensor:
        by_row, by_column = made or linear.quantized(x, columns=training and ctx.needs_input_grad[4])
        weight, weight_amax = linear.weight(weights)
        y = linear.fp8.product(by_row, weight, x.dtype)
        if training:
            kept = (by_column.data, by_column.scale_inv) if by_column else (None, None)
            ctx.save_for_backward(*kept, weight_amax, *weights)
            ctx.linear = linear
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        data, scale_inv, weight_amax, *weights = ctx.saved_tensors
        linear, fp8 = ctx.linear, ctx.linear.fp8
        rows = fp8.one_share(grad.flatten(0, -2), linear.replicated)
        amax = fp8.whole_amax(rows, sharded=not linear.row_parallel)
        by_row, by_column = fp8.quantize(rows, fp8.recipe, fp8.gradient, amax, columns=data is not None)
        grad_x, grad_weights = None, [None] * len(weights)
        if ctx.needs_input_grad[0]:
            transposed = fp8.quantize_weight(_together(weights).t(), fp8.recipe, E4M3, weight_amax)
            grad_x = fp8.product(by_row, transposed, grad.dtype).view(*grad.shape[:-1], -1)
        if data is not None:
            grad_weight = fp8.product(by_column, Quantized(data, scale_inv), weights[0].dtype)
            grad_weights = list(grad_weight.split([len(weight) for weight in weights]))
        return grad_x, None, None, None, *grad_weights


def _together(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))
