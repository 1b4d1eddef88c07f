"""Linear layers and norms, from Transformer Engine or from megatron-core, as the backend table says."""

# t packed tokens (t / tp of them where activations are sequence-parallel), d hidden

from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from torch import Tensor, nn

from prism_kernels.fp8 import Fp8Activation
from prism_kernels.linear import exact as exact_linear
from prism_kernels.matmul import mm
from prism_kernels.norm.exact import add_scaled
from prism_mcore.model.context import ModelContext
from prism_mcore.model.fp8 import Fp8, Fp8Product
from prism_mcore.model.state import Decode, State

Input: TypeAlias = (
    Tensor | Fp8Activation
)  # of a mixer and of a linear: quantised already where a kernel does both in one


def column_linear(context: ModelContext, rows: int, columns: int, bias: bool = False) -> nn.Module:
    """[t, 1, columns] -> [t, 1, rows / tp]; gathers sequence-parallel input."""
    kwargs = _linear_arguments(context, bias)
    te_arguments = {"gather_output": False, "is_expert": False, "tp_comm_buffer_name": None}
    if context.fp8 and context.fp8.by_te:
        from prism_mcore.model import transformer_engine

        return transformer_engine.Fp8ColumnLinear(context.fp8, columns, rows, **te_arguments, **kwargs)
    if context.fp8:
        return Fp8ColumnLinear(context.fp8, columns, rows, **kwargs)
    if context.ops.uses_te("linear"):
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

        return TEColumnParallelLinear(columns, rows, **te_arguments, **kwargs)
    column = ExactColumnLinear if context.ops.uses_exact("linear") else ColumnParallelLinear
    return column(columns, rows, **kwargs)


def row_linear(context: ModelContext, rows: int, columns: int) -> nn.Module:
    """[t, 1, columns / tp] -> [t, 1, rows], no bias; summed over ranks, scattered where sequence-parallel."""
    kwargs = _linear_arguments(context, bias=False) | {"input_is_parallel": True}
    te_arguments = {"is_expert": False, "tp_comm_buffer_name": None}
    if context.fp8 and context.fp8.by_te:
        from prism_mcore.model import transformer_engine

        return transformer_engine.Fp8RowLinear(context.fp8, columns, rows, **te_arguments, **kwargs)
    if context.fp8:
        return Fp8RowLinear(context.fp8, columns, rows, **kwargs)
    if context.ops.uses_te("linear"):
        from megatron.core.extensions.transformer_engine import TERowParallelLinear

        return TERowParallelLinear(columns, rows, **te_arguments, **kwargs)
    row = ExactRowLinear if context.ops.uses_exact("linear") else RowParallelLinear
    return row(columns, rows, **kwargs)


def column_linear_of_parts(context: ModelContext, rows: dict[str, int], columns: int, replicated: int = 0) -> nn.Module:
    """[t, 1, columns] -> [t, 1, sum of rows]: one column-parallel product with several parameters, in their order.

    rows: of each parameter on this rank, whether tensor parallelism shards it or every rank holds it; the parameters
    are called `<name>_weight`, as Transformer Engine's Linear calls those of its `parameters_split`. replicated: how
    many rows, the last, every rank holds.
    """
    if context.fp8 and context.fp8.by_te:
        from prism_mcore.model import transformer_engine

        return transformer_engine.Fp8LinearOfParts(context, context.fp8, rows, columns, replicated)
    return ColumnLinearOfParts(context, rows, columns, replicated)


def project(linear: nn.Module, x: Input, state: State | None) -> Tensor:
    """The product of a linear of this file, [t, 1, columns] -> [t, 1, rows]; the one place that knows of decoding.

    A decoding step need not wait for an overlapped gather of the weight: a prefill comes first.
    """
    if state is not None and isinstance(state.step, Decode) and isinstance(x, Tensor):
        if type(linear) in (ColumnParallelLinear, RowParallelLinear) and linear.tp_group.size() == 1:
            # Straight to the product: what megatron-core does around it is 4% of a step of a small model.
            y = mm(x.squeeze(1), linear.weight.t()).unsqueeze(1)
            return y if linear.bias is None else y + linear.bias
        if isinstance(linear, ColumnLinearOfParts) and x.is_cuda and not linear.exact and linear.fp8 is None:
            return linear.separate_products(x)
    return linear(x)[0]


def _linear_arguments(context: ModelContext, bias: bool) -> dict:
    return {
        "config": context.config,
        "init_method": lambda weight: weight,  # HybridModel initialises every parameter itself
        "bias": bias,
        "skip_bias_add": False,
        "tp_group": context.groups.tp,
    }


class ColumnLinearOfParts(nn.Module):
    """What `column_linear_of_parts` makes, from megatron-core's product or the exact one."""

    def __init__(self, context: ModelContext, rows: dict[str, int], columns: int, replicated: int = 0):
        super().__init__()
        self.context, self.exact = context, context.ops.uses_exact("linear")
        self.fp8 = Fp8Product(context.fp8, "column", replicated) if context.fp8 else None
        for name, count in rows.items():
            weight = nn.Parameter(torch.empty(count, columns, dtype=context.config.params_dtype))
            self.register_parameter(f"{name}_weight", weight)

    def forward(self, x: Input) -> tuple[Tensor, None]:
        """The weights are put together for the product and again for its backward, not kept: 76 MB a layer in
        Nemotron-H at TP 2.
        """
        weights = list(self.parameters())
        if self.fp8 is not None and self.fp8.enabled:
            return fp8_column_product(self.fp8, x, weights, self.context.config.sequence_parallel), None
        weight = torch.cat(weights)
        place = weight.data_ptr()

        def keep(tensor: Tensor) -> Tensor | None:
            return None if tensor.data_ptr() == place else tensor

        def restore(tensor: Tensor | None) -> Tensor:
            return torch.cat([w.detach() for w in weights]) if tensor is None else tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, restore):
            return self._product(x, weight), None

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        tp, sequence_parallel = self.context.groups.tp, self.context.config.sequence_parallel
        if self.exact:
            return exact_column_product(x, weight, tp, sequence_parallel)
        return linear_with_grad_accumulation_and_async_allreduce(
            x,
            weight,
            None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=tp.size() > 1 and not sequence_parallel,
            sequence_parallel=sequence_parallel,
            tp_group=tp,
        )

    def separate_products(self, x: Tensor) -> Tensor:
        """The same for a decoding step, without gradients: there, weights put together are twice the memory traffic.

        Not on a CPU, where a product's last bits can depend on the number of its columns: MKL's do, in fp32 with one
        row and two threads.
        """
        return torch.cat([mm(x.squeeze(1), weight.t()) for weight in self.parameters()], dim=-1).unsqueeze(1)


# --- FP8 --------------------------------------------------------------------------------------------------------------


def fp8_column_product(product: Fp8Product, x: Input, weights: list[Tensor], sequence_parallel: bool) -> Tensor:
    """[t, 1, d] -> [t, 1, rows]; gathers sequence-parallel input."""
    return product(product.fp8.all_tokens(x, sequence_parallel), weights)


class Fp8ColumnLinear(ColumnParallelLinear):
    def __init__(self, fp8: Fp8, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fp8 = Fp8Product(fp8, "column")

    def forward(self, x: Input) -> tuple[Tensor, None]:
        if not self.fp8.enabled:
            return super().forward(x)
        y = fp8_column_product(self.fp8, x, [self.weight], self.sequence_parallel)
        return (y if self.bias is None else y + self.bias), None


class Fp8RowLinear(RowParallelLinear):
    def __init__(self, fp8: Fp8, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fp8 = Fp8Product(fp8, "row")

    def forward(self, x: Input) -> tuple[Tensor, None]:
        if not self.fp8.enabled:
            return super().forward(x)
        y = self.fp8(x, [self.weight])
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(y, group=self.tp_group), None
        return reduce_from_tensor_model_parallel_region(y, group=self.tp_group), None


# --- exact: rows have the same bits in training and decoding ----------------------------------------------------------


def exact_column_product(x: Tensor, weight: Tensor, group: dist.ProcessGroup, sequence_parallel: bool) -> Tensor:
    """[t, 1, d] -> [t, 1, rows]; gathers sequence-parallel input."""
    if sequence_parallel:
        x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
    else:
        x = copy_to_tensor_model_parallel_region(x, group=group)
    return exact_linear.linear(x, weight)


class ExactColumnLinear(ColumnParallelLinear):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        y = exact_column_product(x, self.weight, self.tp_group, self.sequence_parallel)
        return (y if self.bias is None else y + self.bias), None


class ExactRowLinear(RowParallelLinear):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(exact_linear.linear(x, self.weight), self.tp_group, self.sequence_parallel), None


class _SumOverRanks(torch.autograd.Function):
    """Each rank's part of [t, 1, d] -> their sum, or this rank's tokens of it where sequence-parallel."""

    @staticmethod
    def forward(ctx, x, group, sequence_parallel):
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        total = exact_linear.sum_over_ranks(x, group)
        if sequence_parallel:
            return total.chunk(dist.get_world_size(group))[dist.get_rank(group)].contiguous()
        return total

    @staticmethod
    def backward(ctx, grad):
        if not ctx.sequence_parallel:
            return grad, None, None
        whole = grad.new_empty(len(grad) * dist.get_world_size(ctx.group), *grad.shape[1:])
        dist.all_gather_into_tensor(whole, grad.contiguous(), group=ctx.group)
        return whole, None, None


# --- norms ------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, of `size`."""

    def __init__(self, context: ModelContext, size: int):
        super().__init__()
        self.eps = context.spec.norm_eps
        self.rms_norm, self.add_rms_norm = context.ops["rms_norm"], context.ops["add_rms_norm"]
        self.weight = nn.Parameter(torch.empty(size, dtype=context.config.params_dtype))

    def forward(
        self, x: Tensor, branch: Tensor | None = None, alpha: float = 1.0, fp8: Fp8 | None = None
    ) -> Tensor | tuple[Input, Tensor]:
        """The norm of x; with a branch (the norm of h, h) for h = x + alpha * branch, in one pass.

        With `fp8` (the norm in FP8, h or x).
        """
        if fp8 is not None:
            return fp8.norm(x, branch, alpha, self.weight, self.eps)
        if branch is None:
            return self.rms_norm(x, self.weight, self.eps)
        return self.add_rms_norm(x, branch, alpha, self.weight, self.eps)


def norm(context: ModelContext, size: int) -> nn.Module:
    """RMSNorm over the last dimension, of `size`: that of the hidden states, or of a head."""
    if context.ops.uses_te("rms_norm"):
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm(context.config, size, context.spec.norm_eps)
    return RMSNorm(context, size)


def add_and_norm(
    norm: nn.Module, x: Tensor, branch: Tensor | None, alpha: float, fp8: Fp8 | None = None
) -> tuple[Any, Tensor]:
    """(norm(h), h) for h = x + alpha * branch, or x where there is no branch; with `fp8` norm(h) is in FP8."""
    if isinstance(norm, RMSNorm) and (branch is not None or fp8 is not None):
        return norm(x, branch, alpha, fp8)
    h = residual_sum(x, branch, alpha)
    return norm(h), h


def residual_sum(x: Tensor, branch: Tensor | None, alpha: float, exact: bool = False) -> Tensor:
    """x + alpha * branch, or x; `exact` as the exact op set's add_rms_norm rounds it."""
    if branch is None:
        return x
    return add_scaled(x, branch, alpha) if exact else torch.add(x, branch, alpha=alpha)


class Weight(nn.Module):
    """A weight, and perhaps a bias, that another module computes with.

    Call it to get the weight: overlapped parameter gathering waits for a module's parameters when it is called.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[0], dtype=dtype))

    def forward(self) -> Tensor:
        return self.weight
