"""Linear layers and norms, from Transformer Engine or from megatron-core, as the backend table says."""

# t packed tokens (t / tp of them where activations are sequence-parallel), d hidden

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from torch import Tensor, nn

from prism_kernels.matmul import mm
from prism_kernels.norm.exact import add_scaled
from prism_mcore.model.context import ModelContext
from prism_mcore.model.exact import ExactColumnLinear, ExactRowLinear, column_parallel


def column_linear(context: ModelContext, rows: int, columns: int) -> nn.Module:
    """[t, 1, columns] -> [t, 1, rows / tp], no bias; gathers sequence-parallel input."""
    kwargs = _linear_arguments(context)
    if context.ops.uses_te("linear"):
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

        return TEColumnParallelLinear(
            columns, rows, gather_output=False, is_expert=False, tp_comm_buffer_name=None, **kwargs
        )
    column = ExactColumnLinear if context.ops.uses_exact("linear") else ColumnParallelLinear
    return column(columns, rows, **kwargs)


def row_linear(context: ModelContext, rows: int, columns: int) -> nn.Module:
    """[t, 1, columns / tp] -> [t, 1, rows], no bias; summed over ranks, scattered where sequence-parallel."""
    kwargs = _linear_arguments(context)
    if context.ops.uses_te("linear"):
        from megatron.core.extensions.transformer_engine import TERowParallelLinear

        return TERowParallelLinear(
            columns, rows, input_is_parallel=True, is_expert=False, tp_comm_buffer_name=None, **kwargs
        )
    row = ExactRowLinear if context.ops.uses_exact("linear") else RowParallelLinear
    return row(columns, rows, input_is_parallel=True, **kwargs)


def decoded(linear: nn.Module, x: Tensor) -> Tensor:
    """`linear(x)[0]` for a decoding step, [b, 1, columns] -> [b, 1, rows].

    On one rank it goes straight to the product: what megatron-core does around it is 4% of a step of a small model. It
    need not wait for an overlapped gather of the weight: a prefill comes first.
    """
    plain = isinstance(linear, ColumnParallelLinear | RowParallelLinear) and not isinstance(
        linear, ExactColumnLinear | ExactRowLinear
    )
    if plain and linear.tp_group.size() == 1:
        return mm(x.squeeze(1), linear.weight.t()).unsqueeze(1)
    return linear(x)[0]


def _linear_arguments(context: ModelContext) -> dict:
    return {
        "config": context.config,
        "init_method": lambda weight: weight,  # HybridModel initialises every parameter itself
        "bias": False,
        "skip_bias_add": False,
        "tp_group": context.groups.tp,
    }


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the hidden dimension."""

    def __init__(self, context: ModelContext):
        super().__init__()
        self.eps = context.spec.norm_eps
        self.rms_norm, self.add_rms_norm = context.ops["rms_norm"], context.ops["add_rms_norm"]
        self.weight = nn.Parameter(torch.empty(context.spec.hidden_size, dtype=context.config.params_dtype))

    def forward(self, x: Tensor, branch: Tensor | None = None, alpha: float = 1.0) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x; with a branch (the norm of h, h) for h = x + alpha * branch, in one pass."""
        if branch is None:
            return self.rms_norm(x, self.weight, self.eps)
        return self.add_rms_norm(x, branch, alpha, self.weight, self.eps)


def norm(context: ModelContext) -> nn.Module:
    """RMSNorm over the hidden dimension: [t, 1, d] -> [t, 1, d]."""
    if context.ops.uses_te("rms_norm"):
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm(context.config, context.spec.hidden_size, context.spec.norm_eps)
    return RMSNorm(context)


def add_and_norm(norm: nn.Module, x: Tensor, branch: Tensor | None, alpha: float) -> tuple[Tensor, Tensor]:
    """(norm(h), h) for h = x + alpha * branch, or x where there is no branch."""
    if branch is not None and isinstance(norm, RMSNorm):
        return norm(x, branch, alpha)
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


def column_product(x: Tensor, weights: list[Tensor], context: ModelContext) -> Tensor:
    """One column-parallel product with several weights of `rows` each: [t, 1, d] x [rows, d] -> [t, 1, sum of rows].

    They are put together for the product and again for its backward, not kept: 76 MB a layer in Nemotron-H at TP 2.
    """
    weight = torch.cat(weights)
    place, sequence_parallel = weight.data_ptr(), context.config.sequence_parallel

    def keep(tensor: Tensor) -> Tensor | None:
        return None if tensor.data_ptr() == place else tensor

    def restore(tensor: Tensor | None) -> Tensor:
        return torch.cat([w.detach() for w in weights]) if tensor is None else tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, restore):
        if context.ops.uses_exact("linear"):
            return column_parallel(x, weight, context.groups.tp, sequence_parallel)
        return linear_with_grad_accumulation_and_async_allreduce(
            x,
            weight,
            None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=context.groups.tp_size > 1 and not sequence_parallel,
            sequence_parallel=sequence_parallel,
            tp_group=context.groups.tp,
        )
