"""The Mamba-2 scan in plain torch: chunked (fast), and as the plain recurrence (the oracle)."""

# t packed tokens, h heads, p head_dim, g groups, n state, C chunks, Q tokens in a chunk

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from prism_kernels.boundaries import Boundaries
from prism_kernels.precision import accumulate_dtype


def _step_sizes(dt: Tensor, A_log: Tensor, dt_bias: Tensor, limit: tuple[float, float], acc: torch.dtype):
    """dt after bias, softplus and limit, and the log of each step's decay: both [t, h]."""
    step = F.softplus(dt.to(acc) + dt_bias.to(acc))
    if limit != (0.0, math.inf):
        step = step.clamp(*limit)
    return step, step * -A_log.to(acc).exp()


def ssd_scan(
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
    """Mamba-2's selective scan, chunked (arXiv 2405.21060, section 6): S_i = exp(dt_i A) S_{i-1} + dt_i x_i B_i, y = S C + D x.

    x: [t, h, p], dt: [t, h] raw (before dt_bias, softplus, limit), A_log and dt_bias: [h], A = -exp(A_log),
    B and C: [t, g, n] with h % g == 0, D: [h]; initial_state: [documents, h, p, n] (zeros where None).
    Returns y [t, h, p] in x.dtype and, on request, the final states [documents, h, p, n] fp32.
    Decays and states are fp32 (fp64 for fp64 inputs), products are in x.dtype.
    """
    boundaries.check(x=x, dt=dt, B=B, C=C)
    if x.shape[1] % B.shape[1]:
        raise ValueError(f"ssd_scan: {x.shape[1]} heads are not a multiple of {B.shape[1]} groups")
    acc = accumulate_dtype(x.dtype)
    step, decay = _step_sizes(dt, A_log, dt_bias, dt_limit, acc)
    grid = boundaries.chunks(chunk_len)
    heads, groups = x.shape[1], B.shape[1]
    xs, dts, log = grid.fill(x), grid.fill(step), grid.fill(decay).cumsum(1)
    Bs, Cs = (grid.fill(y).repeat_interleave(heads // groups, 2) for y in (B, C))
    xdt = (xs * dts[..., None]).to(x.dtype)
    gap = log.transpose(1, 2)[..., :, None] - log.transpose(1, 2)[..., None, :]
    lower = torch.ones(gap.shape[-2:], dtype=torch.bool, device=x.device).tril()
    decays = gap.masked_fill(~lower, -math.inf).exp()
    scores = torch.einsum("cihn,cjhn->chij", Cs, Bs) * decays
    y = torch.einsum("chij,cjhp->cihp", scores.to(x.dtype), xdt).to(acc)
    weighted = (xdt * (log[:, -1:] - log).exp()[..., None]).to(x.dtype)
    local = torch.einsum("cjhn,cjhp->chpn", Bs, weighted).to(acc)
    total = log[:, -1].exp()[..., None, None]
    if initial_state is None:
        initial_state = local.new_zeros(boundaries.num_documents, *local.shape[1:])
    initial_state = initial_state.to(acc)
    before: list[Tensor] = []
    finals = list(initial_state.unbind(0))
    chunk = 0
    for i, start, end in boundaries.documents:
        for _ in range(-(-(end - start) // grid.chunk_len)):
            before.append(finals[i])
            finals[i] = finals[i] * total[chunk] + local[chunk]
            chunk += 1
    carried = torch.einsum("cihn,chpn->cihp", Cs, torch.stack(before).to(x.dtype)).to(acc)
    y = y + carried * log.exp()[..., None]
    if D is not None:
        y = y + xs * D.to(acc)[:, None]
    y = grid.flatten(y.to(x.dtype))
    return (y, torch.stack(finals)) if return_final_states else y


def ssd_recurrence(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor,
    boundaries: Boundaries,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssd_scan` as the recurrence that defines it, one token at a time: (y, final states). Slow; for tests."""
    acc = accumulate_dtype(x.dtype)
    step, decay = _step_sizes(dt, A_log, dt_bias, dt_limit, acc)
    heads, groups = x.shape[1], B.shape[1]
    wide_B, wide_C = (y.to(acc).repeat_interleave(heads // groups, 1) for y in (B, C))
    wide_x = x.to(acc)
    rows, finals = [], []
    for i in range(boundaries.num_documents):
        state = wide_x.new_zeros(*x.shape[1:], B.shape[2]) if initial_state is None else initial_state[i].to(acc)
        for j in range(boundaries.offsets[i], boundaries.offsets[i + 1]):
            update = (wide_x[j] * step[j, :, None])[..., None] * wide_B[j][:, None]
            state = state * decay[j].exp()[:, None, None] + update
            y = (state * wide_C[j][:, None]).sum(-1)
            rows.append(y if D is None else y + wide_x[j] * D.to(acc)[:, None])
        finals.append(state)
    return torch.stack(rows).to(x.dtype), torch.stack(finals)
