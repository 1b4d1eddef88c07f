"""Other libraries' kernels behind our ops' signatures: flash-attn, mamba-ssm, causal-conv1d; imported when chosen.

Written against flash-attn 2.8.3, mamba-ssm 2.3.2 and causal-conv1d 1.7.0. What a library does not cover of an op raises
`Uncovered` before it is called.
"""

# t packed tokens, h heads, hk key heads, p head_dim, c channels, k taps, g groups, n state

import math

import torch
from torch import Tensor

from prism_kernels.backends import Uncovered
from prism_kernels.boundaries import Boundaries, copied, document_ends

HALF = (torch.bfloat16, torch.float16)


def _longest(boundaries: Boundaries) -> int:
    return max(end - start for _, start, end in boundaries.documents)


def _document_ids(boundaries: Boundaries) -> Tensor:
    """[1, t] int32: which document each token is of."""
    ids = torch.empty(1, boundaries.num_tokens, dtype=torch.int32)
    for i, start, end in boundaries.documents:
        ids[0, start:end] = i
    return copied(ids, boundaries.cu_seqlens.device)


def flash_attn_attention(
    q: Tensor, k: Tensor, v: Tensor, boundaries: Boundaries, scale: float, window: int | None = None
) -> Tensor:
    """`attention` by flash-attn: q [t, h, p], k and v [t, hk, p] in bf16 or fp16, p a multiple of 8 up to 256."""
    boundaries.check(q=q, k=k, v=v)
    if q.dtype not in HALF:
        raise Uncovered(f"flash-attn has no {q.dtype}: needs bf16 or fp16")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise Uncovered(f"head_dim {q.shape[-1]}: flash-attn needs a multiple of 8 up to 256")
    from flash_attn import flash_attn_varlen_func

    ends, longest = boundaries.derive(document_ends), boundaries.derive(_longest)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        ends,
        ends,
        longest,
        longest,
        softmax_scale=scale,
        causal=True,
        # Keys this many before and after the query, beside itself; ours counts itself.
        window_size=(-1, -1) if window is None else (window - 1, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def mamba_ssm_scan(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor,
    boundaries: Boundaries,
    chunk_len: int,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ssd_scan` by mamba-ssm, without states: its chunk grid does not restart at documents, it masks across them."""
    boundaries.check(x=x, dt=dt, B=B, C=C)
    if initial_state is not None or return_final_states:
        raise Uncovered("mamba-ssm keeps one state per batch row, not one per packed document")
    if x.dtype not in (*HALF, torch.float32):
        raise Uncovered(f"mamba-ssm has no {x.dtype}: needs bf16, fp16 or fp32")
    if chunk_len & (chunk_len - 1) or chunk_len < 16:
        raise Uncovered(f"chunk_len {chunk_len}: mamba-ssm needs a power of two, at least 16")
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    y = mamba_chunk_scan_combined(
        x[None],
        dt[None],
        -A_log.float().exp(),
        B[None],
        C[None],
        chunk_len,
        D=D,
        dt_bias=dt_bias,
        seq_idx=boundaries.derive(_document_ids) if len(boundaries.documents) > 1 else None,
        dt_softplus=True,
        dt_limit=tuple(dt_limit),
    )
    return y[0]


def causal_conv1d_package(
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
    from causal_conv1d import causal_conv1d_fn

    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous()  # it reads 16 bytes at a time
    y = causal_conv1d_fn(
        x.t()[None],  # [1, c, t], channels last
        weight,
        bias,
        seq_idx=boundaries.derive(_document_ids),
        activation="silu" if silu else None,
    )
    return y[0].t()
