"""The large linears in FP8 by Transformer Engine: it quantises, communicates and multiplies, we say when and how.

Imported where it is used only: without Transformer Engine megatron-core's wrappers are not classes.
"""

# t packed tokens, k columns, n rows of a weight on this rank

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear
from torch import Tensor
from transformer_engine.common.recipe import Float8BlockScaling, Float8CurrentScaling, Format, QParams

from prism_kernels.fp8 import Recipe
from prism_mcore.model.context import ModelContext
from prism_mcore.model.fp8 import Fp8

ROWS = 16  # cuBLAS reads lines of 16 bytes, and a weight's gradient sums over tokens


@functools.cache
def recipe_of(name: Recipe) -> Any:
    """Transformer Engine's recipe of that name; one object for all, because making one costs more than using it.

    Its scales are powers of two whatever the environment says: NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES counts when
    transformer_engine is imported, and megatron-core imports it.
    """
    if name == "tensorwise":
        recipe = Float8CurrentScaling(fp8_format=Format.HYBRID, use_power_2_scales=True)
    else:
        recipe = Float8BlockScaling(fp8_format=Format.E4M3, use_f32_scales=False)
    for tensor in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"):
        setattr(recipe, tensor, QParams(power_2_scale=True, amax_epsilon=0.0))
    return recipe


def in_fp8(fp8: Fp8, product: Callable[[Tensor], Any], x: Tensor, whole: bool) -> Any:
    """product(x [t, 1, k]) under the recipe, where it is in force.

    Entered around every product, so inside what is recomputed: the backward pass recomputes it in FP8, too. whole: x
    has all tokens that are multiplied; zeros make up the rows that are missing to a multiple, and raise no scale.
    """
    if not fp8.enabled:
        return product(x)
    tokens, missing = len(x), -len(x) % ROWS if whole else 0
    with te.autocast(enabled=True, recipe=recipe_of(fp8.recipe)):
        y = product(F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x)
    return y[:tokens] if missing else y


class Fp8ColumnLinear(TEColumnParallelLinear):
    def __init__(self, shared: Fp8, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.shared = shared  # Transformer Engine has an attribute `fp8` of its own

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        product = super().forward
        return in_fp8(self.shared, lambda rows: product(rows)[0], x, whole=not self.sequence_parallel), None


class Fp8RowLinear(TERowParallelLinear):
    def __init__(self, shared: Fp8, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.shared = shared

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        product = super().forward
        return in_fp8(self.shared, lambda rows: product(rows)[0], x, whole=not self.sequence_parallel), None


class Fp8LinearOfParts(te.Linear):
    """What `linear.column_linear_of_parts` makes: one product, several parameters.

    Tokens are gathered here, not by Transformer Engine, which knows no weight that is sharded in one part only.
    """

    def __init__(self, context: ModelContext, shared: Fp8, rows: dict[str, int], columns: int, replicated: int):
        super().__init__(
            columns,
            sum(rows.values()),
            bias=False,
            params_dtype=context.config.params_dtype,
            init_method=lambda weight: weight,
            parameters_split=rows,
            device=torch.get_default_device(),
        )
        self.context, self.shared, self.replicated = context, shared, replicated

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x = self.shared.all_tokens(x, self.context.config.sequence_parallel)
        y = in_fp8(self.shared, super().forward, x, whole=True)
        return _OneShare.apply(y, self.shared, self.replicated), None


class _OneShare(torch.autograd.Function):
    """The same numbers; of the gradient of rows that every rank holds each takes its share, `Fp8.one_share`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, fp8: Fp8, replicated: int) -> Tensor:
        ctx.fp8, ctx.replicated = fp8, replicated
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.fp8.one_share(grad.flatten(0, -2), ctx.replicated).view_as(grad), None, None
