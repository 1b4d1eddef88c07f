"""The ops of a decode step in plain torch: one new token for each of b running sequences."""

# b rows, c channels, k taps, h heads, hk key heads, p head_dim, g groups, n state, L longest context in blocks

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from prism_kernels.caches import ConvCache, PagedCache, ScanCache
from prism_kernels.precision import accumulate_dtype


def conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, cache: ConvCache, slots: Tensor, silu: bool = True
) -> Tensor:
    """`causal_conv1d` of one token for each row: x [b, c] -> [b, c]; the rows' slots [b] int64 of the cache move on."""
    window = torch.cat([cache.state[slots], x[..., None]], -1).to(accumulate_dtype(x.dtype))
    y = (window * weight.to(window.dtype)).sum(-1)
    y = y if bias is None else y + bias
    cache.state[slots] = window[..., 1:].to(cache.state.dtype)
    return (F.silu(y) if silu else y).to(x.dtype)


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor,
    cache: ScanCache,
    slots: Tensor,
    positions: Tensor,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """`ssd_scan` of one token for each row: x [b, h, p], dt [b, h], B and C [b, g, n] -> [b, h, p].

    slots [b] int64: the rows' places in the cache, which move on; positions [b] int64: the token's place in its
    document, for caches that restart at each chunk (not this one).
    """
    acc = accumulate_dtype(x.dtype)
    heads, groups = x.shape[1], B.shape[1]
    step = F.softplus(dt.to(acc) + dt_bias.to(acc)).clamp(*dt_limit)
    decay = (step * -A_log.to(acc).exp()).exp()
    B, C = (y.to(acc).repeat_interleave(heads // groups, 1) for y in (B, C))
    wide = x.to(acc)
    state = cache.state[slots] * decay[..., None, None] + (wide * step[..., None])[..., None] * B[:, :, None]
    cache.state[slots] = state
    y = (state @ C[..., None])[..., 0]
    return (y if D is None else y + wide * D.to(acc)[:, None]).to(x.dtype)


def attention_decode(
    q: Tensor, cache: PagedCache, block_table: Tensor, lengths: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Attention of each row's newest token over its sequence: q [b, h, p] -> [b, h, p].

    block_table [b, L] int32: the blocks of each sequence in order (any valid block beyond its end); lengths [b] int32:
    tokens in it, the newest one included, whose key and value are already written.
    """
    acc, rows, heads_per_kv = accumulate_dtype(q.dtype), len(q), q.shape[1] // cache.keys.shape[2]
    keys, values = (x[block_table.long()].flatten(1, 2) for x in (cache.keys, cache.values))  # [b, s, hk, p]
    grouped = q.view(rows, -1, heads_per_kv, q.shape[2])
    scores = torch.einsum("bkmp,bskp->bkms", grouped, keys).to(acc) * scale
    place = torch.arange(keys.shape[1], device=q.device)
    hidden = place >= lengths[:, None]
    if window is not None:
        hidden |= place < lengths[:, None] - window
    weights = scores.masked_fill_(hidden[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bkms,bskp->bkmp", weights.to(q.dtype), values).flatten(1, 2)
