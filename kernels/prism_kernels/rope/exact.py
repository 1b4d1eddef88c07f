"""Rotary embedding whose elements have the same bits wherever they lie: products and their sum are rounded apart."""

# t packed tokens, h heads, hk key heads, p head_dim

import torch
from torch import Tensor

from prism_kernels.rope import reference


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    wide = x.to(cos.dtype) if x.dtype != torch.float64 else x
    swapped = torch.cat((wide[..., half:], wide[..., :half]), -1)
    return (wide * cos).add_(swapped.mul_(sin)).to(x.dtype)


class _Rope(reference._Rope):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the halves of each head (non-interleaved, as Llama): q [t, h, p], k [t, hk, p], tables of `rope_table`."""
    return _Rope.apply(q, k, cos[:, None], sin[:, None])
