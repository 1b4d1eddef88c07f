"""Other libraries' implementations of our ops, each prepared from the arguments ours takes.

`PEERS[row][peer](work)` gives (call, leaves): inputs laid out as that library wants them, outside of what is timed, and
the inputs whose gradients its backward makes. A library that is not installed raises ImportError, and is left out:

    pip install liger-kernel quack-kernels flash-attn causal-conv1d 'transformer-engine[pytorch]'
    MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-build-isolation --no-deps mamba-ssm

(the last line is for a machine without a GPU: of mamba-ssm only the Triton kernels are used here).
"""

# t packed tokens, d hidden, f MLP width, h heads, p head_dim, g groups, n state

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_bench.op_cases import Case
from kernel_bench.works import Work
from prism_kernels import backends

Prepared = tuple[Callable[[], Any], tuple[Tensor, ...]]


def _leaf(x: Tensor, like: Tensor) -> Tensor:
    return x.detach().requires_grad_(like.requires_grad)


def _import_mamba() -> None:
    """Make mamba_ssm's Triton files importable where the compiled module that its package imports is missing."""
    if "mamba_ssm" in sys.modules or importlib.util.find_spec("selective_scan_cuda"):
        return
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None:
        raise ImportError("mamba_ssm")
    package = types.ModuleType("mamba_ssm")
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["mamba_ssm"] = package


# ------------------------------------------------------------------------------------------------ norms, elementwise


def liger_rms_norm(work: Work) -> Prepared:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    x, weight, eps = work.args
    return lambda: LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", True, None), work.leaves


def quack_rms_norm(work: Work) -> Prepared:
    from quack import rmsnorm

    x, weight, eps = work.args
    return lambda: rmsnorm(x, weight, eps=eps), work.leaves


def te_rms_norm(work: Work) -> Prepared:
    import transformer_engine.pytorch as te

    x, weight, eps = work.args
    norm = te.RMSNorm(x.shape[-1], eps=eps, params_dtype=x.dtype, device=x.device)
    with torch.no_grad():
        norm.weight.copy_(weight)
    return lambda: norm(x), (x, norm.weight) if work.leaves else ()


def torch_rms_norm(work: Work) -> Prepared:
    x, weight, eps = work.args
    return lambda: F.rms_norm(x, weight.shape, weight, eps), work.leaves


def liger_add_rms_norm(work: Work) -> Prepared:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    x, branch, alpha, weight, eps = work.args
    if alpha != 1:
        raise NotImplementedError("Liger's sum has no multiplier")
    return lambda: LigerFusedAddRMSNormFunction.apply(x, branch, weight, eps, 0.0, "llama", False), work.leaves


def torch_add_rms_norm(work: Work) -> Prepared:
    x, branch, alpha, weight, eps = work.args

    def call() -> tuple[Tensor, Tensor]:
        h = x + alpha * branch
        return F.rms_norm(h, weight.shape, weight, eps), h

    return call, work.leaves


def mamba_gated_rms_norm(work: Work) -> Prepared:
    _import_mamba()
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    y, z, weight, eps, groups = work.args
    size = y.shape[-1] // groups
    return lambda: rmsnorm_fn(y, weight, None, z, eps, size, norm_before_gate=False), work.leaves


def torch_gated_rms_norm(work: Work) -> Prepared:
    y, z, weight, eps, groups = work.args

    def call() -> Tensor:
        gated = (y.float() * F.silu(z.float())).unflatten(-1, (groups, -1))
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
        return (normed.flatten(-2) * weight).to(y.dtype)

    return call, work.leaves


def liger_swiglu(work: Work) -> Prepared:
    """Liger takes gate and up apart, each contiguous."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    (gate_up,) = work.args
    gate, up = (_leaf(half.detach().contiguous(), gate_up) for half in gate_up.chunk(2, -1))
    return lambda: LigerSiLUMulFunction.apply(gate, up), (gate, up) if work.leaves else ()


def torch_swiglu(work: Work) -> Prepared:
    (gate_up,) = work.args

    def call() -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    return call, work.leaves


def liger_squared_relu(work: Work) -> Prepared:
    from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction

    (x,) = work.args
    return lambda: LigerReLUSquaredFunction.apply(x), work.leaves


def torch_squared_relu(work: Work) -> Prepared:
    (x,) = work.args
    return lambda: F.relu(x).square(), work.leaves


def liger_rope(work: Work) -> Prepared:
    """Liger rotates [b, h, t, p] in place; its sin carries no sign."""
    from liger_kernel.ops.rope import LigerRopeFunction

    q, k, cos, sin = work.args
    half = sin.shape[-1] // 2
    sin = torch.cat([sin[:, half:], sin[:, half:]], -1)
    q, k = (_leaf(x.detach().clone(memory_format=torch.contiguous_format)[None].transpose(1, 2), x) for x in (q, k))

    def call() -> tuple[Tensor, Tensor]:
        rotated = LigerRopeFunction.apply(q, k, cos[None], sin[None])
        return tuple(x.squeeze(0).transpose(0, 1) for x in rotated)

    return call, (q, k) if work.leaves else ()


def torch_rope(work: Work) -> Prepared:
    q, k, cos, sin = work.args

    def rotate(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, -1)
        return (x * cos[:, None] + torch.cat([second, first], -1) * sin[:, None]).to(x.dtype)

    return lambda: (rotate(q), rotate(k)), work.leaves


# --------------------------------------------------------------------------------------------------------- Mamba-2


def causal_conv1d_package(work: Work) -> Prepared:
    from causal_conv1d import causal_conv1d_fn

    x, weight, bias, _ = work.args

    def call() -> Tensor:
        return causal_conv1d_fn(x[None].transpose(1, 2), weight, bias, activation="silu").squeeze(0).t()

    return call, work.leaves


def torch_causal_conv1d(work: Work) -> Prepared:
    x, weight, bias, boundaries = work.args
    taps, channels = weight.shape[1], weight.shape[0]

    def call() -> Tensor:
        y = F.conv1d(x.t()[None], weight[:, None], bias, padding=taps - 1, groups=channels)
        return F.silu(y.squeeze(0).narrow(1, 0, boundaries.num_tokens).t())

    return call, work.leaves


def causal_conv1d_package_step(work: Work) -> Prepared:
    from causal_conv1d import causal_conv1d_update

    x, weight, bias, cache, slots = work.args
    slots = slots.to(torch.int32)
    state = cache.state.detach().clone()
    return lambda: causal_conv1d_update(x, state, weight, bias, "silu", conv_state_indices=slots), ()


def mamba_ssd_scan(work: Work) -> Prepared:
    _import_mamba()
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    inputs, _, chunk = work.args

    def call() -> Tensor:
        x, dt, B, C = (y[None] for y in (inputs.x, inputs.dt, inputs.B, inputs.C))
        A = -torch.exp(inputs.A_log)
        return mamba_chunk_scan_combined(x, dt, A, B, C, chunk, D=inputs.D, dt_bias=inputs.dt_bias, dt_softplus=True)

    return call, work.leaves


def mamba_ssd_step(work: Work) -> Prepared:
    _import_mamba()
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    inputs, cache, slots, _ = work.args
    x, B, C = inputs.x, inputs.B, inputs.C
    (heads, p), n = x.shape[1:], B.shape[-1]
    A = -torch.exp(inputs.A_log)[:, None, None].expand(heads, p, n)
    D, dt_bias = (y[:, None].expand(heads, p) for y in (inputs.D, inputs.dt_bias))
    dt = inputs.dt[:, :, None].expand(*x.shape)
    state, slots = cache.state.detach().clone(), slots.to(torch.int32)

    def call() -> Tensor:
        return selective_state_update(
            state, x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True, state_batch_indices=slots
        )

    return call, ()


# ------------------------------------------------------------------------------------------------- attention, loss


def flash_attention(work: Work) -> Prepared:
    from flash_attn import flash_attn_varlen_func

    q, k, v, boundaries, scale, window = work.args
    ends, longest = boundaries.cu_seqlens, boundaries.num_tokens
    sides = (-1, -1) if window is None else (window - 1, 0)

    def call() -> Tensor:
        return flash_attn_varlen_func(
            q, k, v, ends, ends, longest, longest, softmax_scale=scale, causal=True, window_size=sides
        )

    return call, work.leaves


def torch_attention(work: Work) -> Prepared:
    """torch's own fused kernels (the whole batch is one document)."""
    q, k, v, _, scale, window = work.args
    if window is not None and window < len(q):
        raise ImportError("torch's fused attention has no sliding window")

    def call() -> Tensor:
        q_, k_, v_ = (x.transpose(0, 1)[None] for x in (q, k, v))
        y = F.scaled_dot_product_attention(q_, k_, v_, is_causal=True, scale=scale, enable_gqa=True)
        return y.squeeze(0).transpose(0, 1)

    return call, work.leaves


def flash_attention_decode(work: Work) -> Prepared:
    from flash_attn import flash_attn_with_kvcache

    q, cache, table, lengths, scale, window = work.args
    if cache.block_len % 256:
        raise ImportError("flash-attn's paged cache needs blocks of 256 tokens")
    sides = (-1, -1) if window is None else (window - 1, 0)

    def call() -> Tensor:
        return flash_attn_with_kvcache(
            q[:, None],
            cache.keys,
            cache.values,
            cache_seqlens=lengths,
            block_table=table,
            softmax_scale=scale,
            causal=True,
            window_size=sides,
        )

    return call, ()


def liger_linear_cross_entropy(work: Work) -> Prepared:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    hidden, weight, labels = work.args
    if work.kwargs["logits_divisor"] != 1:
        raise NotImplementedError("Liger's loss has no divisor")
    return lambda: LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels)[0], work.leaves


def torch_linear_cross_entropy(work: Work) -> Prepared:
    """What a model without a fused loss does: all logits, then their log-softmax in fp32."""
    (hidden, weight, labels), divisor = work.args, work.kwargs["logits_divisor"]
    return lambda: F.cross_entropy(F.linear(hidden, weight).float() / divisor, labels), work.leaves


PEERS: dict[str, dict[str, Callable[[Work], Prepared]]] = {
    "rms_norm": {"liger": liger_rms_norm, "quack": quack_rms_norm, "te": te_rms_norm, "torch": torch_rms_norm},
    "add_rms_norm": {"liger": liger_add_rms_norm, "torch": torch_add_rms_norm},
    "gated_rms_norm": {"mamba-ssm": mamba_gated_rms_norm, "torch": torch_gated_rms_norm},
    "swiglu": {"liger": liger_swiglu, "torch": torch_swiglu},
    "squared_relu": {"liger": liger_squared_relu, "torch": torch_squared_relu},
    "rope": {"liger": liger_rope, "torch": torch_rope},
    "causal_conv1d": {"causal-conv1d": causal_conv1d_package, "torch": torch_causal_conv1d},
    "conv_step": {"causal-conv1d": causal_conv1d_package_step},
    "ssd_scan": {"mamba-ssm": mamba_ssd_scan},
    "ssd_step": {"mamba-ssm": mamba_ssd_step},
    "attention": {"flash-attn": flash_attention, "torch": torch_attention},
    "attention_decode": {"flash-attn": flash_attention_decode},
    "linear_cross_entropy": {"liger": liger_linear_cross_entropy, "torch": torch_linear_cross_entropy},
}
TRITON = {"liger", "mamba-ssm"}  # those whose kernels are Triton's, which compile and count here without a GPU
# Liger's loss takes another way of accumulating the weight's gradient where it finds no CUDA device.
NOT_WITHOUT_GPU = {("linear_cross_entropy", "liger")}


def prepare(case: Case, work: Work, side: str) -> Prepared:
    """(call, leaves) of our Triton kernel ("ours") or a peer's, which raises where it does not cover the inputs."""
    if side == "ours":
        function = backends.function(case.row.op, "triton").__wrapped__  # type: ignore[attr-defined]  # no way back
        return lambda: function(*work.args, **work.kwargs), work.leaves
    return PEERS[case.row.name][side](work)
