"""The Mamba-2 scan on a GPU: `reference.ssd_scan` in Triton kernels for Hopper, forward and backward."""

# t packed tokens, h heads, p head_dim, g groups, n state, C chunks

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from prism_kernels.backends import Uncovered
from prism_kernels.boundaries import Boundaries, ScanTables
from prism_kernels.caches import ScanCache
from prism_kernels.scan.backward import Slots, launch_group_grads, launch_inner_grads, launch_step_grads
from prism_kernels.scan.forward import Decays, Shape, launch_decays, launch_outputs, launch_states
from prism_kernels.scan.inputs import ScanInputs
from prism_kernels.scan.step import ssd_step

__all__ = ["ssd_prefill", "ssd_scan", "ssd_step"]

WIDEST = 128  # head_dim and state
WALKS = 256  # programs that walk over chunks: about two per multiprocessor of an H100


def ssd_scan(
    inputs: ScanInputs,
    boundaries: Boundaries,
    chunk_len: int,
    initial_state: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.ssd_scan`; of chunk_len at most 128 is taken, of heads wider than 64 at most 64, in fp32 at most 32.

    Covered: x, B and C alike bf16 or fp32, head_dim and state up to 128.
    """
    inputs.check(boundaries, chunk_len)
    x, dt, B, C = inputs.x, inputs.dt, inputs.B, inputs.C
    if x.dtype not in (torch.bfloat16, torch.float32) or not x.dtype == B.dtype == C.dtype:
        raise Uncovered(f"x {x.dtype}, B {B.dtype}, C {C.dtype}: needs all bfloat16 or all float32")
    if max(x.shape[2], B.shape[2]) > WIDEST:
        raise Uncovered(f"head_dim {x.shape[2]}, state {B.shape[2]}: needs at most {WIDEST}")
    head_dim, state = x.shape[2], B.shape[2]
    more_p, more_n = (max(16, triton.next_power_of_2(size)) - size for size in (head_dim, state))
    if more_p or more_n:
        x, B, C = F.pad(x, (0, more_p)), F.pad(B, (0, more_n)), F.pad(C, (0, more_n))
        initial_state = initial_state if initial_state is None else F.pad(initial_state, (0, more_n, 0, more_p))
    x, B, C = (_rows(y) for y in (x, B, C))
    dt = dt if dt.stride(1) == 1 else dt.contiguous()
    tensors = (x, dt, inputs.A_log, B, C, inputs.D, inputs.dt_bias, initial_state)
    y, final = _Scan.apply(*tensors, boundaries, chunk_len, inputs.dt_limit, return_final_states)
    if more_p or more_n:
        y, final = y[..., :head_dim], None if final is None else final[..., :head_dim, :state]
    return (y, final) if return_final_states else y


def ssd_prefill(inputs: ScanInputs, boundaries: Boundaries, chunk_len: int, cache: ScanCache, slots: Tensor) -> Tensor:
    """`reference.ssd_prefill`, on the inputs that `ssd_scan` covers."""
    y, final = ssd_scan(inputs, boundaries, chunk_len, return_final_states=True)
    cache.state[slots] = final.to(cache.state.dtype)
    return y


def _rows(x: Tensor) -> Tensor:
    """x [t, k, l] as it is where the tensor engine can copy it, else a copy.

    It wants each token's k * l values together, and tokens and the first of them at multiples of 16 bytes.
    """
    together = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    aligned = x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return x if together and aligned else x.clone(memory_format=torch.contiguous_format)


def _longest_chunk(x: Tensor) -> int:
    """Tokens whose tiles a program holds; of 128 with heads of 128 they would take 290 KB of shared memory."""
    if x.dtype == torch.float32:
        return 32  # no tensor cores, and tiles are twice as large
    return 64 if x.shape[2] > 64 else 128


def _tables(boundaries: Boundaries, chunk_len: int, heads: int, device: torch.device) -> ScanTables:
    """Chunks, and segments just short enough that WALKS programs, each one head and half of n, have one."""
    chunks = -(-boundaries.num_tokens // chunk_len)
    return boundaries.scan_tables(chunk_len, max(1, chunks * 2 * heads // WALKS), device)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A_log, B, C, D, dt_bias, initial, boundaries, chunk_len, limit, want_final):
        longest = max(end - start for _, start, end in boundaries.documents)
        # A power of two where documents are shorter than a chunk: kernels are compiled for few lengths.
        chunk_len = min(chunk_len, _longest_chunk(x), max(16, triton.next_power_of_2(longest)))
        shape, tables = Shape.of(x, B, chunk_len), _tables(boundaries, chunk_len, x.shape[1], x.device)
        if 4 * tables.num_chunks * shape.num_heads * shape.Q >= 2**31:  # kernels' offsets into four [C, h, Q] are int32
            raise Uncovered(f"{tables.num_chunks} chunks of {shape.num_heads} heads: needs fewer than 2^29 rows in all")
        initial = initial if initial is None else initial.contiguous()
        decays = launch_decays(dt, dt_bias, A_log, tables, limit, shape)
        states, final = launch_states(x, B, decays, tables, shape, initial, want_final, boundaries.num_documents)
        y = launch_outputs(x, B, C, D, decays, states, tables, shape)
        ctx.save_for_backward(x, dt, A_log, B, C, D, dt_bias, *decays, states)
        ctx.tables, ctx.shape, ctx.limit = tables, shape, limit
        ctx.initial_dtype = None if initial is None else initial.dtype
        ctx.num_documents = boundaries.num_documents
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx, grad, grad_final):
        x, dt, A_log, B, C, D, dt_bias, *saved = ctx.saved_tensors
        decays, before, tables, shape = Decays(*saved[:-1]), saved[-1], ctx.tables, ctx.shape
        grad = torch.zeros_like(x) if grad is None else _rows(grad)
        grad_final = None if grad_final is None else grad_final.contiguous()
        after, grad_initial = launch_states(
            grad, C, decays, tables, shape, grad_final, ctx.initial_dtype is not None, ctx.num_documents, backward=True
        )
        slots = Slots.empty(tables, shape, x.device)
        grad_x, grad_scores, own_scores, falling = launch_inner_grads(
            x, grad, B, C, D, decays, after, tables, shape, slots
        )
        grad_B, grad_C, products = launch_group_grads(
            x, grad, B, C, decays, before, after, grad_scores, tables, shape, slots
        )
        grad_dt, shares = launch_step_grads(
            dt, dt_bias, A_log, decays, own_scores, falling, products, slots, tables, ctx.limit, shape
        )
        grad_bias, grad_A_log, grad_D = shares.sum(1)
        return (
            grad_x,
            grad_dt,
            grad_A_log.to(A_log.dtype),
            grad_B,
            grad_C,
            None if D is None else grad_D.to(D.dtype),
            grad_bias.to(dt_bias.dtype),
            None if grad_initial is None else grad_initial.to(ctx.initial_dtype),
            *(None,) * 4,
        )
