"""Mamba-2: projection, causal conv, chunked scan, gated norm; tensor-parallel over heads, one SSM group or many."""

# t packed tokens, d hidden, h heads, p head_dim, g groups, n state, i = h * p inner width; h, g, i of this rank

import torch
from torch import Tensor, nn

from prism_mcore.model.linear import Build, Weight, column_product, row_linear
from prism_mcore.model.sequence import Sequence


class Mamba(nn.Module):
    """The Mamba-2 mixer (arXiv 2405.21060).

    megatron-core's own mixer refuses one SSM group under tensor parallelism, cannot be built without CUDA, and has no
    seam for a scan of ours. Here B and C have parameters of their own: cut over ranks where groups divide, else held by
    every rank, their gradients then summed over ranks (`train/step.py`).
    """

    def __init__(self, build: Build):
        super().__init__()
        spec, tp = build.spec, build.groups.tp_size
        self.build, self.spec = build, spec
        self.heads = spec.mamba_num_heads // tp
        self.groups = max(spec.ssm_groups // tp, 1)
        self.inner, self.state = self.heads * spec.mamba_head_dim, self.groups * spec.ssm_state_size
        # A norm group of one for the whole width spans all ranks: they share its sum of squares.
        self.norm_groups = max(spec.gated_norm_groups // tp, 1)
        self.norm_ranks = build.groups.tp if spec.gated_norm_groups == 1 and tp > 1 else None

        dtype = build.config.params_dtype
        self.in_proj = Weight((2 * self.inner + self.heads, spec.hidden_size), dtype)
        self.in_proj_bc = Weight((2 * self.state, spec.hidden_size), dtype)
        self.conv_x = Weight((self.inner, spec.conv_kernel), dtype, bias=spec.conv_bias)
        self.conv_bc = Weight((2 * self.state, spec.conv_kernel), dtype, bias=spec.conv_bias)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(self.heads)) for _ in range(3))
        self.norm = Weight((self.inner,), dtype)
        self.out_proj = row_linear(build, spec.hidden_size, spec.mamba_num_heads * spec.mamba_head_dim)
        self.conv, self.scan = build.ops["causal_conv1d"], build.ops["ssd_scan"]
        self.gated_norm = build.ops["gated_rms_norm"]

    def forward(self, x: Tensor, seq: Sequence, state: None = None) -> Tensor:
        """[t, 1, d] -> [t, 1, d]."""
        spec = self.spec
        zdtxbc = column_product(x, [self.in_proj(), self.in_proj_bc()], self.build).squeeze(1)
        z, dt, xbc = zdtxbc.split([self.inner, self.heads, self.inner + 2 * self.state], dim=-1)
        conv_weight = torch.cat([self.conv_x(), self.conv_bc()])
        conv_bias = torch.cat([self.conv_x.bias, self.conv_bc.bias]) if spec.conv_bias else None
        xbc = self.conv(xbc, conv_weight, conv_bias, seq.boundaries)
        xs, B, C = xbc.split([self.inner, self.state, self.state], dim=-1)
        y = self.scan(
            xs.unflatten(-1, (self.heads, -1)),
            dt,
            self.A_log,
            B.unflatten(-1, (self.groups, -1)),
            C.unflatten(-1, (self.groups, -1)),
            self.D,
            self.dt_bias,
            seq.boundaries,
            spec.chunk_len,
            spec.dt_limit,
        )
        y = self.gated_norm(y.flatten(-2), z, self.norm(), spec.norm_eps, self.norm_groups, self.norm_ranks)
        return self.out_proj(y.unsqueeze(1))[0]
