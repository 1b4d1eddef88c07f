"""Rotary embedding in plain torch."""

# t packed tokens, h heads, hk key heads, p head_dim

import torch
from torch import Tensor


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    wide = x.to(cos.dtype) if x.dtype != torch.float64 else x
    swapped = torch.cat((wide[..., half:], wide[..., :half]), -1)
    return (wide * cos).addcmul_(swapped, sin, value=sign).to(x.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(q, cos, sin, 1), _rotate(k, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad_q, grad_k):
        cos, sin = ctx.saved_tensors
        return _rotate(grad_q, cos, sin, -1), _rotate(grad_k, cos, sin, -1), None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the halves of each head (non-interleaved, as Llama): q [t, h, p], k [t, hk, p], tables of `rope_table`."""
    return _Rope.apply(q, k, cos[:, None], sin[:, None])
