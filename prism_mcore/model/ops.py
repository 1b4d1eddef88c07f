"""The functions behind the op table: what the model's layers call."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from prism_kernels import reference
from prism_kernels.backends import Choice, select

REFERENCE: dict[str, Callable[..., Any]] = {
    "rms_norm": reference.rms_norm,
    "gated_rms_norm": reference.gated_rms_norm,
    "swiglu": reference.swiglu,
    "squared_relu": reference.squared_relu,
    "rope": reference.apply_rope,
    "causal_conv1d": reference.causal_conv1d,
    "ssd_scan": reference.ssd_scan,
    "linear_cross_entropy": reference.linear_cross_entropy,
    "attention": reference.attention,
}


class Ops:
    """`ops["ssd_scan"]` is the function to call, `ops.choices["ssd_scan"]` says which implementation it is and why."""

    def __init__(self, overrides: Mapping[str, str], device: torch.device):
        self.choices: dict[str, Choice] = select(overrides, device)

    def uses_te(self, op: str) -> bool:
        """Is this op one of Transformer Engine's modules? It then has no function here."""
        return self.choices[op].backend == "te"

    def __getitem__(self, op: str) -> Callable[..., Any]:
        return REFERENCE[op]
