"""Which dtype sums, statistics, decays and states are kept in."""

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 inputs (so that gradients can be checked numerically), else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
