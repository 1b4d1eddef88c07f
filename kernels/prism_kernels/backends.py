"""The one table of which implementation each op uses, decided once at start."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

import torch

# op -> implementation -> the package it needs ("" for none) in order of preference; Triton kernels join here.
REFERENCE_ONLY = {"reference": ""}
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "linear": {
        "te": "transformer_engine",
        "megatron": "",
    },  # the column- and row-parallel linears around attention and MLP
    "rms_norm": {"te": "transformer_engine", "reference": ""},
    "attention": {"te": "transformer_engine", "reference": ""},
    "gated_rms_norm": REFERENCE_ONLY,
    "swiglu": REFERENCE_ONLY,
    "squared_relu": REFERENCE_ONLY,
    "rope": REFERENCE_ONLY,
    "causal_conv1d": REFERENCE_ONLY,
    "ssd_scan": REFERENCE_ONLY,
    "linear_cross_entropy": REFERENCE_ONLY,
}
CUDA_ONLY = {"te"}
INSTALL = {
    "te": "pip install 'transformer-engine[pytorch]'",
    "flash_attn": "pip install flash-attn",
    "mamba_ssm": "pip install mamba-ssm causal-conv1d",
    "triton": "pip install triton",
}


@dataclass(frozen=True)
class Choice:
    """`Choice("reference", "the only one for this op")`."""

    backend: str
    reason: str


Backends = dict[str, Choice]  # op -> its choice


def select(overrides: Mapping[str, str], device: torch.device | str) -> Backends:
    """One backend per op, with the reason; `overrides` (op -> backend, "auto" for our choice) are obeyed or refused.

    Errors: an unknown op, a backend that does not exist for the op or whose package is not installed.
    """
    unknown = [op for op in overrides if op not in IMPLEMENTATIONS]
    if unknown:
        raise ValueError(f"kernels.{unknown[0]}: no such op; ops are {', '.join(IMPLEMENTATIONS)}")
    return {op: _choose(op, overrides.get(op, "auto"), torch.device(device)) for op in IMPLEMENTATIONS}


def _choose(op: str, wanted: str, device: torch.device) -> Choice:
    table = IMPLEMENTATIONS[op]
    available = [
        name
        for name, package in table.items()
        if (not package or importlib.util.find_spec(package)) and (device.type == "cuda" or name not in CUDA_ONLY)
    ]
    if wanted == "auto":
        only = "the only one" if len(table) == 1 else "the fastest one"
        return Choice(available[0], f"{only} here for this op on {device.type}")
    if wanted in available:
        return Choice(wanted, f"asked for by kernels.{op}")
    message = f"kernels.{op}={wanted}: not available; available are {', '.join(available)}"
    if wanted in table:
        message += f"; install it with: {INSTALL[wanted]}"
    elif wanted in INSTALL:
        message += f" (this version has no {wanted} implementation of {op}, installed or not: {INSTALL[wanted]})"
    raise ValueError(message)
