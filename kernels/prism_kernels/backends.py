"""The one table of which implementation each op uses, decided once at start."""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prism_kernels import interpreter

log = logging.getLogger(__name__)

# backend -> the package it needs, "" for none
PACKAGES = {
    "te": "transformer_engine",
    "flash_attn": "flash_attn",
    "mamba_ssm": "mamba_ssm",
    "causal_conv1d": "causal_conv1d",
    "apex": "apex",
    "triton": "triton",
    "megatron": "",
    "torch": "",
    "reference": "",
    "exact": "",
}
INSTALL = {
    "te": "pip install 'transformer-engine[pytorch]'",
    "flash_attn": "pip install flash-attn",
    "mamba_ssm": "pip install mamba-ssm causal-conv1d",
    "causal_conv1d": "pip install causal-conv1d",
    "apex": "see github.com/NVIDIA/apex",
    "triton": "pip install triton",
}
CUDA_ONLY = {"te", "flash_attn", "mamba_ssm", "causal_conv1d", "apex"}
REFERENCE = "prism_kernels.reference:"
EXACT = "prism_kernels.exact:"  # the same bits in training and decoding, in any batch; on a CPU
PEERS = "prism_kernels.peers:"
# No function but a class of another library, built in model/linear.py, model/attention.py or train/optimizer.py.
MODULE = ""


# op -> backend -> where its function is, in order of preference
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    # the column- and row-parallel linears around attention and MLP
    "linear": {"te": MODULE, "megatron": MODULE, "exact": MODULE},
    "rms_norm": {
        "te": MODULE,
        "triton": "prism_kernels.rms_norm:rms_norm",
        "reference": REFERENCE + "rms_norm",
        "exact": EXACT + "rms_norm",
    },
    "add_rms_norm": {  # a residual sum and the norm after it
        "triton": "prism_kernels.rms_norm:add_rms_norm",
        "reference": REFERENCE + "add_rms_norm",
        "exact": EXACT + "add_rms_norm",
    },
    "gated_rms_norm": {
        "triton": "prism_kernels.gated_rms_norm:gated_rms_norm",
        "reference": REFERENCE + "gated_rms_norm",
        "exact": EXACT + "gated_rms_norm",
    },
    "swiglu": {
        "triton": "prism_kernels.activations:swiglu",
        "reference": REFERENCE + "swiglu",
        "exact": EXACT + "swiglu",
    },
    "squared_relu": {
        "triton": "prism_kernels.activations:squared_relu",
        "reference": REFERENCE + "squared_relu",
        "exact": EXACT + "squared_relu",
    },
    "rope": {
        "triton": "prism_kernels.rope:apply_rope",
        "reference": REFERENCE + "apply_rope",
        "exact": EXACT + "apply_rope",
    },
    "causal_conv1d": {
        "triton": "prism_kernels.causal_conv1d:causal_conv1d",
        "causal_conv1d": PEERS + "causal_conv1d_package",
        "reference": REFERENCE + "causal_conv1d",
        "exact": EXACT + "causal_conv1d",
    },
    "conv_step": {
        "triton": "prism_kernels.causal_conv1d:conv_step",
        "reference": REFERENCE + "conv_step",
        "exact": EXACT + "conv_step",
    },
    "ssd_scan": {
        "triton": "prism_kernels.ssd_scan:ssd_scan",
        "mamba_ssm": PEERS + "mamba_ssm_scan",
        "reference": REFERENCE + "ssd_scan",
        "exact": EXACT + "ssd_scan",
    },
    "ssd_cache": {"reference": REFERENCE + "ssd_cache", "exact": EXACT + "ssd_cache"},
    "ssd_prefill": {
        "triton": "prism_kernels.ssd_scan:ssd_prefill",
        "reference": REFERENCE + "ssd_prefill",
        "exact": EXACT + "ssd_prefill",
    },
    "ssd_step": {
        "triton": "prism_kernels.ssd_step:ssd_step",
        "reference": REFERENCE + "ssd_step",
        "exact": EXACT + "ssd_step",
    },
    "linear_cross_entropy": {
        "triton": "prism_kernels.linear_cross_entropy:linear_cross_entropy",
        "reference": REFERENCE + "linear_cross_entropy",
        "exact": EXACT + "linear_cross_entropy",
    },
    "lm_logits": {"reference": REFERENCE + "lm_logits", "exact": "prism_kernels.exact_loss:logits"},
    "attention": {
        "te": MODULE,
        "flash_attn": PEERS + "flash_attn_attention",
        "triton": "prism_kernels.attention:attention",
        "reference": REFERENCE + "attention",
        "exact": EXACT + "attention",
    },
    "attention_decode": {
        "triton": "prism_kernels.attention_decode:attention_decode",
        "reference": REFERENCE + "attention_decode",
        "exact": EXACT + "attention_decode",
    },
    # Where neither Transformer Engine nor apex brings megatron-core its own.
    "adamw": {
        "te": MODULE,
        "apex": MODULE,
        "triton": "prism_kernels.adamw:adamw",
        "torch": MODULE,
        "reference": REFERENCE + "adamw",
    },
}

# (op, backend): a token's result has the same bits whatever other documents are in the call. What is not listed was not
# shown to be: products by cuBLAS or oneDNN choose their order of sums by the number of rows.
BATCH_INVARIANT = {(op, "exact") for op, table in IMPLEMENTATIONS.items() if "exact" in table} | {
    # Each row, or each token and channel, is computed by itself, in tiles that its width alone decides.
    (op, "triton")
    for op in ("rms_norm", "add_rms_norm", "gated_rms_norm", "swiglu", "squared_relu", "rope", "causal_conv1d")
}


class Uncovered(ValueError):
    """A kernel does not cover these inputs (dtype, head_dim, alignment); raised before anything is launched."""


@dataclass(frozen=True)
class Choice:
    """`Choice("reference", "the only one here for this op on cpu", batch_invariant=False)`."""

    backend: str
    reason: str
    batch_invariant: bool  # see BATCH_INVARIANT


Backends = dict[str, Choice]  # op -> its choice


def select(overrides: Mapping[str, str], device: torch.device | str) -> Backends:
    """One backend per op, with the reason; `overrides` (op -> backend, "auto" for our choice) are obeyed or refused.

    On a CPU, Triton's kernels run in its interpreter, which is for tests: only when asked for, with TRITON_INTERPRET=1.
    Errors: an unknown op, a backend that does not exist for the op or whose package is not installed.
    """
    unknown = [op for op in overrides if op not in IMPLEMENTATIONS]
    if unknown:
        raise ValueError(f"kernels.{unknown[0]}: no such op; ops are {', '.join(IMPLEMENTATIONS)}")
    return {op: _choose(op, overrides.get(op, "auto"), torch.device(device)) for op in IMPLEMENTATIONS}


def function(op: str, backend: str) -> Callable[..., Any]:
    """The function behind an op; where a kernel does not cover its inputs the reference is called, with one warning."""
    implementation = _imported(IMPLEMENTATIONS[op][backend])
    if backend in ("reference", "exact"):
        return implementation
    if backend == "triton" and interpreter.active():
        interpreter.install()
    return _with_fallback(op, implementation, _imported(IMPLEMENTATIONS[op]["reference"]))


def _imported(place: str) -> Callable[..., Any]:
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def _with_fallback(op: str, kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    warned: set[str] = set()

    @functools.wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return kernel(*args, **kwargs)
        except Uncovered as reason:
            if str(reason) not in warned:
                warned.add(str(reason))
                log.warning("%s: %s; plain torch is used instead", op, reason)
        return reference(*args, **kwargs)

    return call


def why_not(backend: str, device: torch.device) -> str | None:
    """Why this backend cannot run here, or None."""
    package = PACKAGES[backend]
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed: {INSTALL[backend]}"
    if device.type == "cuda" and backend == "exact":
        return "its bits are promised on a CPU only"
    if device.type != "cuda" and backend in CUDA_ONLY:
        return f"it needs a GPU, the device is {device.type}"
    if device.type != "cuda" and backend == "triton" and not interpreter.active():
        return f"it needs a GPU, or TRITON_INTERPRET=1; the device is {device.type}"
    return None


def _choice(op: str, backend: str, reason: str) -> Choice:
    return Choice(backend, reason, (op, backend) in BATCH_INVARIANT)


def _choose(op: str, wanted: str, device: torch.device) -> Choice:
    table = IMPLEMENTATIONS[op]
    missing = {backend: why_not(backend, device) for backend in table}
    available = [backend for backend, why in missing.items() if why is None]
    if wanted == "auto":
        on_request = {"exact"} | (set() if device.type == "cuda" else {"triton"})
        candidates = [backend for backend in available if backend not in on_request]
        first = "the first in order of preference" if len(candidates) > 1 else "the only one"
        return _choice(op, candidates[0], f"{first} here for this op on {device.type}")
    if wanted in available:
        return _choice(op, wanted, f"asked for by kernels.{op}")
    message = f"kernels.{op}={wanted}: not available; available are {', '.join(available)}"
    if wanted in table:
        message += f"; {missing[wanted]}"
    elif wanted in INSTALL:
        message += f" (this version has no {wanted} implementation of {op}, installed or not)"
    raise ValueError(message)
