"""Other libraries' convolution behind our op's signature, imported when it is chosen; against causal-conv1d 1.7.0.

What a library does not cover of an op raises `Uncovered` before it is called.
"""

# t packed tokens, c channels, k taps

import torch
from torch import Tensor

from prism_kernels.backends import Uncovered
from prism_kernels.boundaries import Boundaries, document_ids
from prism_kernels.precision import HALF


def causal_conv1d_by_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    boundaries: Boundaries,
    silu: bool = True,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d` by the package of that name, without states, which it does not take together with documents."""
    boundaries.check(x=x)
    if initial_state is not None or return_final_state:
        raise Uncovered("causal-conv1d takes no states together with packed documents")
    if x.dtype not in (*HALF, torch.float32):
        raise Uncovered(f"causal-conv1d has no {x.dtype}: needs bf16, fp16 or fp32")
    if not 2 <= weight.shape[1] <= 4 or x.shape[1] % 8:
        raise Uncovered(f"{weight.shape[1]} taps, {x.shape[1]} channels: needs 2 to 4, and a multiple of 8")
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn

    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous()  # it reads 16 bytes at a time
    y = causal_conv1d_fn(
        x.t()[None],  # [1, c, t], channels last
        weight,
        bias,
        seq_idx=boundaries.derive(document_ids),
        activation="silu" if silu else None,
    )
    return y[0].t()
