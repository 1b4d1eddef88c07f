"""The table of ops: which backends each has, where their functions are, and what a backend needs. No torch in here.

An op is one operation of a model or its optimizer; a backend is one implementation of it. `kernels.<op>=<backend>` in a
recipe names one of each. A function is found by convention: of the op `rms_norm` in the folder `norm`, `triton` is
`prism_kernels/norm/triton.py: rms_norm`, and so are `reference` and `exact`; another library's function is in
`peers.py` under a name that says both, `attention_by_flash_attn`. So a new op is a folder and a row of `OPS`.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Backend:
    """`Backend("peers", ("flash_attn.flash_attn_interface",), "pip install flash-attn", gpu_only=True)`."""

    file: str  # in the op's folder; "" for a class of another library, built in prism_mcore/model or prism_mcore/train
    needs: tuple[
        str, ...
    ] = ()  # the modules that are called, each `a` or `a|b` (either): a name may be another package's
    install: str = ""
    gpu_only: bool = False


BACKENDS: dict[str, Backend] = {
    # Its torch extension is a package of its own, and lies where the way it was built puts it.
    "te": Backend(
        "",
        (
            "transformer_engine.pytorch",
            "transformer_engine_torch|transformer_engine.transformer_engine_torch"
            "|transformer_engine.wheel_lib.transformer_engine_torch",
        ),
        "pip install 'transformer-engine[pytorch]'",
        gpu_only=True,
    ),
    # PyPI's `apex` is another package; NVIDIA's without its CUDA extensions has a FusedAdam that cannot be made.
    "apex": Backend("", ("apex.optimizers.fused_adam", "amp_C"), "see github.com/NVIDIA/apex", gpu_only=True),
    # flash-attn-4 installs into the same `flash_attn`, without these.
    "flash_attn": Backend(
        "peers", ("flash_attn.flash_attn_interface", "flash_attn_2_cuda"), "pip install flash-attn", gpu_only=True
    ),
    "triton": Backend("triton", ("triton.language",), "pip install triton"),
    # Its package imports the compiled module first, whatever is wanted of it.
    "mamba_ssm": Backend(
        "peers",
        ("mamba_ssm.ops.triton.ssd_combined", "selective_scan_cuda"),
        "pip install mamba-ssm causal-conv1d",
        gpu_only=True,
    ),
    "causal_conv1d": Backend(
        "peers",
        ("causal_conv1d.causal_conv1d_interface", "causal_conv1d_cuda"),
        "pip install causal-conv1d",
        gpu_only=True,
    ),
    "megatron": Backend(""),
    "torch": Backend("peers"),
    "reference": Backend("reference"),  # plain torch
    "exact": Backend("exact"),  # the same bits in training and decoding, in any batch; on a CPU
}


@dataclass(frozen=True)
class Op:
    """`Op("norm", ("te", "triton", "reference", "exact"))`: its folder, and its backends in order of preference."""

    folder: str
    backends: tuple[str, ...]
    classes: tuple[str, ...] = ()  # of those: no functions, though the backend has functions of other ops


OURS = ("triton", "reference", "exact")
OPS: dict[str, Op] = {
    "linear": Op("linear", ("te", "megatron", "exact")),  # the column- and row-parallel linears around the mixers
    # Where precision.fp8 is on: the product of quantised matrices under those linears, and the quantising.
    "fp8_linear": Op("fp8_linear", ("te", "torch", "triton", "reference", "exact")),
    "fp8_amax": Op("quantize", ("triton", "reference")),
    "fp8_quantize": Op("quantize", ("triton", "reference")),
    "fp8_quantize_weight": Op("quantize", ("triton", "reference")),
    "rms_norm_quantize": Op("quantize", ("triton", "reference")),  # with or without a residual sum before it
    "swiglu_quantize": Op("quantize", ("triton", "reference")),
    "squared_relu_quantize": Op("quantize", ("triton", "reference")),
    "rms_norm": Op("norm", ("te", *OURS)),
    "add_rms_norm": Op("norm", OURS),  # a residual sum and the norm after it
    "gated_rms_norm": Op("norm", OURS),
    "swiglu": Op("activation", OURS),
    "squared_relu": Op("activation", OURS),
    "rope": Op("rope", OURS),
    "causal_conv1d": Op("conv", ("triton", "causal_conv1d", "reference", "exact")),
    "conv_step": Op("conv", OURS),
    "ssd_scan": Op("scan", ("triton", "mamba_ssm", "reference", "exact")),
    "ssd_cache": Op("scan", ("reference", "exact")),
    "ssd_prefill": Op("scan", OURS),
    "ssd_step": Op("scan", OURS),
    "linear_cross_entropy": Op("loss", OURS),
    "lm_logits": Op("loss", ("reference", "exact")),
    "attention": Op("attention", ("te", "flash_attn", *OURS)),
    "attention_decode": Op("attention", OURS),
    # Where neither Transformer Engine nor apex brings megatron-core its own.
    "adamw": Op("adamw", ("te", "apex", "triton", "torch", "reference"), classes=("torch",)),
}

# (op, backend): a token's result has the same bits whatever other documents are in the call. What is not listed was not
# shown to be: products by cuBLAS or oneDNN choose their order of sums by the number of rows.
BATCH_INVARIANT = {(name, "exact") for name, op in OPS.items() if "exact" in op.backends} | {
    # Each row, or each token and channel, is computed by itself, in tiles that its width alone decides.
    (name, "triton")
    for name in ("rms_norm", "add_rms_norm", "gated_rms_norm", "swiglu", "squared_relu", "rope", "causal_conv1d")
}


def place(op: str, backend: str) -> tuple[str, str] | None:
    """(module, name) of a backend's function, `("prism_kernels.norm.triton", "rms_norm")`; None where it is a class."""
    file = "" if backend in OPS[op].classes else BACKENDS[backend].file
    name = f"{op}_by_{backend}" if file == "peers" else op
    return (f"prism_kernels.{OPS[op].folder}.{file}", name) if file else None


def check_choices(overrides: Mapping[str, str]) -> None:
    """Every key is an op and every value one of its backends, or "auto"; whether it can be had here is not asked.

    overrides: `kernels.*` of the settings, op -> backend. Raises ValueError with the nearest op, or the op's backends.
    """
    for op, backend in overrides.items():
        if op not in OPS:
            raise ValueError(f"kernels.{op}: no such op{_nearest(op, OPS, 'kernels.')}; ops are {', '.join(OPS)}")
        backends = ("auto", *OPS[op].backends)
        if backend not in backends:
            raise ValueError(
                f"kernels.{op}={backend}: {op} has no such backend{_nearest(backend, backends)}; it has"
                f" {', '.join(backends)}"
            )


def _nearest(name: str, names: Mapping[str, Op] | tuple[str, ...], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, names, 1, 0.5)
    return f" (did you mean {prefix}{near[0]}?)" if near else ""
