"""Mamba-2: projection, causal conv, chunked scan, gated norm; tensor-parallel over heads, one SSM group or many."""

# t packed tokens, d hidden, h heads, p head_dim, g groups, n state, i = h * p inner width; h, g, i of this rank

import torch
from torch import Tensor, nn

from prism_kernels.caches import ConvCache
from prism_kernels.scan.inputs import ScanInputs
from prism_mcore.model.context import ModelContext
from prism_mcore.model.linear import Input, Weight, column_linear_of_parts, project, row_linear
from prism_mcore.model.state import Decode, MambaCache, PackedTokens, State

# Parameters of the table whose names here follow from the module that computes with both.
GLOBAL_NAMES = {
    "mixer.in_proj.zdtx_weight": "mixer.in_proj.weight",
    "mixer.in_proj.bc_weight": "mixer.in_proj_bc.weight",
}

OPS = ("causal_conv1d", "conv_step", "ssd_scan", "ssd_cache", "ssd_prefill", "ssd_step")


class Mamba(nn.Module):
    """The Mamba-2 mixer (arXiv 2405.21060).

    megatron-core's own mixer refuses one SSM group under tensor parallelism, cannot be built without CUDA, and has no
    seam for a scan of ours. Here B and C have parameters of their own: sharded where groups divide, else held by
    every rank, their gradients then summed over ranks (`train/optimizer.py`).
    """

    def __init__(self, context: ModelContext):
        super().__init__()
        spec, tp = context.spec, context.groups.tp_size
        self.spec = spec
        self.heads = spec.mamba_num_heads // tp
        self.groups = max(spec.ssm_groups // tp, 1)
        self.inner, self.state = self.heads * spec.mamba_head_dim, self.groups * spec.ssm_state_size
        # A norm group of one for the whole width spans all ranks: they share its sum of squares.
        self.norm_groups = max(spec.gated_norm_groups // tp, 1)
        self.norm_ranks = context.groups.tp if spec.gated_norm_groups == 1 and tp > 1 else None

        dtype = context.config.params_dtype
        rows = {"zdtx": 2 * self.inner + self.heads, "bc": 2 * self.state}
        replicated = rows["bc"] if spec.ssm_groups == 1 else 0
        self.in_proj = column_linear_of_parts(context, rows, spec.hidden_size, replicated)
        self.conv_x = Weight((self.inner, spec.conv_kernel), dtype, bias=spec.conv_bias)
        self.conv_bc = Weight((2 * self.state, spec.conv_kernel), dtype, bias=spec.conv_bias)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(self.heads)) for _ in range(3))
        self.norm = Weight((self.inner,), dtype)
        self.out_proj = row_linear(context, spec.hidden_size, spec.mamba_num_heads * spec.mamba_head_dim)
        self.ops = {op: context.ops[op] for op in OPS}
        self.gated_norm = context.ops["gated_rms_norm"]

    def cache(self, slots: int, dtype: torch.dtype, device: torch.device) -> MambaCache:
        """Room for the states of so many sequences."""
        spec = self.spec
        shape = (slots, self.heads, spec.mamba_head_dim, self.groups, spec.ssm_state_size)
        conv = ConvCache.allocate(slots, self.inner + 2 * self.state, spec.conv_kernel, dtype, device)
        return MambaCache(conv, self.ops["ssd_cache"](*shape, dtype, device))

    def forward(self, x: Input, seq: PackedTokens, state: State | None = None) -> Tensor:
        """[t, 1, d] -> [t, 1, d]."""
        spec = self.spec
        projected = project(self.in_proj, x, state).squeeze(1)
        z, dt, xbc = projected.split([self.inner, self.heads, self.inner + 2 * self.state], dim=-1)
        xbc = self._convolved(xbc, seq, state)
        xs, B, C = xbc.split([self.inner, self.state, self.state], dim=-1)
        B, C = (y.unflatten(-1, (self.groups, -1)) for y in (B, C))
        xs = xs.unflatten(-1, (self.heads, -1))
        y = self._scanned(ScanInputs(xs, dt, self.A_log, B, C, self.D, self.dt_bias, spec.dt_limit), seq, state)
        y = self.gated_norm(y.flatten(-2), z, self.norm(), spec.norm_eps, self.norm_groups, self.norm_ranks)
        return project(self.out_proj, y.unsqueeze(1), state)

    def _convolved(self, xbc: Tensor, seq: PackedTokens, state: State | None) -> Tensor:
        weight = torch.cat([self.conv_x(), self.conv_bc()])
        bias = torch.cat([self.conv_x.bias, self.conv_bc.bias]) if self.spec.conv_bias else None
        if state is None:
            conv = self.ops["causal_conv1d"]
            if seq.reach is not None:
                return seq.reach.convolution(conv, xbc, weight, bias)
            return conv(xbc, weight, bias, seq.boundaries)
        assert isinstance(state.cache, MambaCache), "a Mamba sub-layer caches its states"
        if isinstance(state.step, Decode):
            return self.ops["conv_step"](xbc, weight, bias, state.cache.conv, state.step.slots)
        y, final = self.ops["causal_conv1d"](xbc, weight, bias, seq.boundaries, return_final_state=True)
        state.cache.conv.state[state.step.slots] = final.to(state.cache.conv.state.dtype)
        return y

    def _scanned(self, inputs: ScanInputs, seq: PackedTokens, state: State | None) -> Tensor:
        """[t, h, p]."""
        chunk_len = self.spec.chunk_len
        if state is None:
            if seq.reach is not None:
                return seq.reach.scan(self.ops["ssd_scan"], inputs, chunk_len)
            return self.ops["ssd_scan"](inputs, seq.boundaries, chunk_len)
        assert isinstance(state.cache, MambaCache), "a Mamba sub-layer caches its states"
        scan, step = state.cache.scan, state.step
        if isinstance(step, Decode):
            return self.ops["ssd_step"](inputs, scan, step.slots, step.positions)
        return self.ops["ssd_prefill"](inputs, seq.boundaries, chunk_len, scan, step.slots)
