"""Products through oneDNN."""

import pytest
import torch
import torch.nn.functional as F
from tiny.accuracy import assert_as_exact_as, randn

from prism_mcore.megatron_patches import ParallelLinear

DTYPES = [torch.float32, torch.bfloat16]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def test_linear_through_onednn_is_as_exact_as_torch():
    torch.manual_seed(0)  # large enough for oneDNN, odd sizes
    inputs = [randn(130, 257, dtype=torch.float32), randn(101, 257, dtype=torch.float32)]
    no_parallelism = (None, None, False, False, None, None, None)
    assert_as_exact_as(lambda x, weight: ParallelLinear.apply(x, weight, *no_parallelism), F.linear, inputs)
