"""Other libraries' scan behind our op's signature, imported when it is chosen; written against mamba-ssm 2.3.2.

What a library does not cover of an op raises `Uncovered` before it is called.
"""

# t packed tokens, h heads, p head_dim, g groups, n state

import torch
from torch import Tensor

from prism_kernels.backends import Uncovered
from prism_kernels.boundaries import Boundaries, document_ids
from prism_kernels.precision import HALF
from prism_kernels.scan.inputs import ScanInputs


def ssd_scan_by_mamba_ssm(
    inputs: ScanInputs,
    boundaries: Boundaries,
    chunk_len: int,
    initial_state: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ssd_scan` by mamba-ssm, without states: its chunk grid does not restart at documents, it masks across them."""
    inputs.check(boundaries, chunk_len)
    x = inputs.x
    if initial_state is not None or return_final_states:
        raise Uncovered("mamba-ssm keeps one state per batch row, not one per packed document")
    if x.dtype not in (*HALF, torch.float32):
        raise Uncovered(f"mamba-ssm has no {x.dtype}: needs bf16, fp16 or fp32")
    if chunk_len & (chunk_len - 1) or chunk_len < 16:
        raise Uncovered(f"chunk_len {chunk_len}: mamba-ssm needs a power of two, at least 16")
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    y = mamba_chunk_scan_combined(
        x[None],
        inputs.dt[None],
        -inputs.A_log.float().exp(),
        inputs.B[None],
        inputs.C[None],
        chunk_len,
        D=inputs.D,
        dt_bias=inputs.dt_bias,
        seq_idx=boundaries.derive(document_ids) if len(boundaries.documents) > 1 else None,
        dt_softplus=True,
        dt_limit=tuple(inputs.dt_limit),
    )
    return y[0]
