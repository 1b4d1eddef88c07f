"""One decode step of the Mamba-2 scan: `reference.ssd_step` in one Triton kernel, each state read and written once."""

# b rows, h heads, p head_dim, g groups, n state

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.backends import Uncovered
from prism_kernels.caches import ScanCache
from prism_kernels.scan.inputs import ScanInputs

# Elements of a state in one program: 16 KB in and out for 4 warps, 32 fp32 values per thread in 16-byte accesses.
# Chosen by what it compiles to, 72 registers, so that seven programs fit a multiprocessor; not yet a measurement.
STATE_ELEMENTS = 4096


@triton.jit
def step_kernel(
    x, dt, A_log, B, C, D, dt_bias, state, slots, y, low, high, num_heads, heads_per_group,
    x_stride, dt_stride, B_stride, C_stride, slot_stride,
    WIDTH: tl.constexpr, STATE: tl.constexpr, P: tl.constexpr, N: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """One row, one head, P of its head_dim: S <- decay S + dt x B, y = S C + D x."""
    row, head, start = tl.program_id(2), tl.program_id(1), tl.program_id(0) * P
    p, n = start + tl.arange(0, P), tl.arange(0, N)
    inside = (p < WIDTH)[:, None] & (n < STATE)[None, :]
    slot = tl.load(slots + row).to(tl.int64)
    places = state + slot * slot_stride + head * (WIDTH * STATE) + p[:, None] * STATE + n[None, :]
    before = tl.load(places, mask=inside, other=0.0)
    wide_row, column = row.to(tl.int64), head // heads_per_group * STATE + n
    raw = tl.load(dt + wide_row * dt_stride + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    small = tl.exp(-tl.abs(raw))
    above = 1.0 + small
    # log(1 + small), corrected for what 1 + small rounds off (Kahan)
    log1p = tl.where(above == 1.0, small, tl.log(above) * (small / tl.maximum(above - 1.0, 1e-30)))
    step = tl.maximum(raw, 0.0) + log1p
    step = tl.minimum(tl.maximum(step, low), high)
    decay = tl.exp(-step * tl.exp(tl.load(A_log + head).to(tl.float32)))
    values = tl.load(x + wide_row * x_stride + head * WIDTH + p, mask=p < WIDTH, other=0.0).to(tl.float32)
    keys = tl.load(B + wide_row * B_stride + column, mask=n < STATE, other=0.0).to(tl.float32)
    queries = tl.load(C + wide_row * C_stride + column, mask=n < STATE, other=0.0).to(tl.float32)
    after = before * decay + (values * step)[:, None] * keys[None, :]
    tl.store(places, after, mask=inside)
    out = tl.sum(after * queries[None, :], 1)
    if SKIP:
        out += tl.load(D + head).to(tl.float32) * values
    tl.store(y + (wide_row * num_heads + head) * WIDTH + p, out.to(y.dtype.element_ty), mask=p < WIDTH)


def ssd_step(inputs: ScanInputs, cache: ScanCache, slots: Tensor, positions: Tensor) -> Tensor:
    """`reference.ssd_step`; slots must differ from each other, as each is read and written by its own programs.

    Covered: fp32 states, x, B and C in bf16 or fp32, state up to 256.
    """
    x, dt, B, C, D = inputs.x, inputs.dt, inputs.B, inputs.C, inputs.D
    if cache.state.dtype != torch.float32 or x.dtype not in (torch.bfloat16, torch.float32):
        raise Uncovered(f"state {cache.state.dtype}, x {x.dtype}: needs float32, and bfloat16 or float32")
    (b, heads, head_dim), (groups, state) = x.shape, B.shape[1:]
    if state > 256:
        raise Uncovered(f"state {state}: needs at most 256")
    if not cache.state[0].is_contiguous():
        raise Uncovered(f"a slot's state with strides {cache.state.stride()[1:]}: needs a contiguous one")
    x, B, C = (_rows(y) for y in (x, B, C))
    dt = dt if dt.stride(1) == 1 else dt.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    columns = triton.next_power_of_2(state)
    rows = min(triton.next_power_of_2(head_dim), STATE_ELEMENTS // columns)
    step_kernel[triton.cdiv(head_dim, rows), heads, b](
        x, dt, inputs.A_log, B, C, inputs.dt_bias if D is None else D, inputs.dt_bias, cache.state, slots, y,
        *inputs.dt_limit,
        heads, heads // groups, x.stride(0), dt.stride(0), B.stride(0), C.stride(0), cache.state.stride(0),
        WIDTH=head_dim, STATE=state, P=rows, N=columns, SKIP=D is not None, num_warps=4,
    )  # fmt: skip
    return y


def _rows(x: Tensor) -> Tensor:
    """x [b, k, l] as it is where each row's k * l values lie together, else a copy."""
    return x if x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2]) else x.contiguous()
