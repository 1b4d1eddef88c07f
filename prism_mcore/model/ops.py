"""The functions behind the op table: what the model's layers call."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from prism_kernels.backends import SelectedBackend, function, select


class Ops:
    """`ops["ssd_scan"]` is the function to call, `ops.backends["ssd_scan"]` says which backend it is of and why."""

    def __init__(self, overrides: Mapping[str, str], device: torch.device):
        self.backends: dict[str, SelectedBackend] = select(overrides, device)
        self._functions: dict[str, Callable[..., Any]] = {}  # one each: it warns once that inputs are not covered

    def uses_te(self, op: str) -> bool:
        """Is this op one of Transformer Engine's modules? It then has no function here."""
        return self.backends[op].name == "te"

    def uses_exact(self, op: str) -> bool:
        """Does this op give the same bits in training and decoding?"""
        return self.backends[op].name == "exact"

    def __getitem__(self, op: str) -> Callable[..., Any]:
        if op not in self._functions:
            self._functions[op] = function(op, self.backends[op].name)
        return self._functions[op]
