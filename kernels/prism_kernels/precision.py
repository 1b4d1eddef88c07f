"""Which dtype sums, statistics, decays and states are kept in."""

import math

import torch

LOG2_E = math.log2(math.e)  # exp(x) = exp2(x * LOG2_E)
HALF = (torch.bfloat16, torch.float16)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 inputs (so that gradients can be checked numerically), else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
