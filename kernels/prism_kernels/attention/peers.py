"""Other libraries' attention behind our op's signature, imported when it is chosen; written against flash-attn 2.8.3.

What a library does not cover of an op raises `Uncovered` before it is called.
"""

# t packed tokens, h heads, hk key heads, p head_dim

import torch
from torch import Tensor

from prism_kernels.backends import Uncovered
from prism_kernels.boundaries import Boundaries, document_ends, longest_document
from prism_kernels.precision import HALF


def attention_by_flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: Boundaries,
    scale: float,
    window: int | None = None,
    keys: Boundaries | None = None,
) -> Tensor:
    """`attention` by flash-attn: q [t, h, p], k and v [tk, hk, p] in bf16 or fp16, p a multiple of 8 up to 256.

    It aligns the last query of a document with its last key, as `keys` asks for.
    """
    keys = boundaries if keys is None else keys
    boundaries.check(q=q)
    keys.check(k=k, v=v)
    boundaries.check_keys(keys)
    if q.dtype not in HALF:
        raise Uncovered(f"flash-attn has no {q.dtype}: needs bf16 or fp16")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise Uncovered(f"head_dim {q.shape[-1]}: flash-attn needs a multiple of 8 up to 256")
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k,
        v,
        boundaries.derive(document_ends),
        keys.derive(document_ends),
        boundaries.derive(longest_document),
        keys.derive(longest_document),
        softmax_scale=scale,
        causal=True,
        # Keys this many before and after the query, beside itself; ours counts itself.
        window_size=(-1, -1) if window is None else (window - 1, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
