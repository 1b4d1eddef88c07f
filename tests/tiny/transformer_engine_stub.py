"""As much of Transformer Engine as megatron-core's wrappers import and call, in plain torch: `install()` before both.

Written after Transformer Engine 2.11's signatures. It knows fewer arguments than the real one on purpose: a call with
another name, layout or mask is an error. Products are of full precision in FP8, too, but it says which were to be in
it: `PRODUCTS`. `CALLS` has the arguments' names by what was called.
"""

# t packed tokens, h query heads, k key/value heads, p head_dim

import functools
import importlib.machinery
import sys
import types
from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES = """
common common.recipe pytorch pytorch.attention pytorch.attention.rope pytorch.cpu_offload pytorch.cross_entropy
pytorch.distributed pytorch.float8_tensor pytorch.fp8 pytorch.graph pytorch.jit pytorch.module pytorch.module.base
pytorch.ops pytorch.permutation pytorch.router pytorch.tensor pytorch.tensor.utils pytorch.utils
""".split()  # noqa: SIM905


PRODUCTS: list[object] = []  # the recipe that was in force in each product of a Linear, or None
CALLS: dict[str, set[str]] = {}  # "Linear.__init__" -> {"in_features", ...}
recipes_in_force: list[object] = []


def noted(call: Callable) -> Callable:
    """The same, its arguments' names written down."""

    @functools.wraps(call)
    def noting(*args, **kwargs):
        CALLS.setdefault(call.__qualname__, set()).update(kwargs)
        return call(*args, **kwargs)

    return noting


class Recipe:
    def __init__(self, **given):
        CALLS.setdefault(type(self).__name__, set()).update(given)
        self.__dict__.update(given)


class Float8CurrentScaling(Recipe): ...


class Float8BlockScaling(Recipe): ...


class QParams(Recipe): ...


class Format:
    HYBRID, E4M3 = "e4m3, gradients e5m2", "e4m3"


@noted
@contextmanager
def autocast(enabled, recipe):
    assert enabled
    recipes_in_force.append(recipe)
    try:
        yield
    finally:
        recipes_in_force.pop()


class Linear(nn.Module):
    @noted
    def __init__(
        self, in_features, out_features, *, params_dtype, bias, device, parallel_mode=None, tp_size=1,
        return_bias=False, sequence_parallel=False, parameters_split=None, **others,
    ):  # fmt: skip
        super().__init__()
        assert (return_bias, tp_size) == (False, 1) and (parallel_mode in ("column", "row") or parameters_split)
        assert sum((parameters_split or {"": out_features}).values()) == out_features
        self.sequence_parallel = sequence_parallel
        for name, rows in (parameters_split or {"": out_features}).items():
            weight = nn.Parameter(torch.empty(rows, in_features, dtype=params_dtype, device=device))
            self.register_parameter(f"{name}_weight" if name else "weight", weight)
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=params_dtype, device=device)) if bias else torch.Tensor()
        )

    @noted
    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        assert is_first_microbatch is None, "a weight that is kept in FP8 may be read when it is stale"
        PRODUCTS.append(recipes_in_force[-1] if recipes_in_force else None)
        assert PRODUCTS[-1] is None or x[..., 0].numel() % 16 == 0, "FP8 products have multiples of 16 rows"
        weight = torch.cat([tensor for name, tensor in self.named_parameters() if name.endswith("weight")])
        return F.linear(x, weight, self.bias if len(self.bias) else None)


class RMSNorm(nn.Module):
    @noted
    def __init__(self, hidden_size, eps, sequence_parallel, zero_centered_gamma, params_dtype, device):
        super().__init__()
        assert not zero_centered_gamma
        self.eps, self.weight = eps, nn.Parameter(torch.empty(hidden_size, dtype=params_dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class DotProductAttention(nn.Module):
    @noted
    def __init__(self, num_attention_heads, kv_channels, *, softmax_scale, attention_dropout, **others):
        super().__init__()
        assert attention_dropout == 0 and others["tp_size"] == 1
        self.heads, self.scale, self.window = num_attention_heads, softmax_scale, others.get("window_size")

    @noted
    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: None, **packed) -> Tensor:
        """q [t, h, p], k and v [tk, k, p] -> [t, h * p]."""
        assert (packed["qkv_format"], attention_mask) == ("thd", None)
        spans = [self._spans(packed, kind) for kind in ("q", "kv")]
        # It would align the first query of a document with its first key.
        assert (packed["attn_mask_type"] == "padding_causal_bottom_right") == (spans[0] != spans[1])
        k, v = (x.repeat_interleave(self.heads // x.shape[1], dim=1) for x in (k, v))
        parts = [
            self._document(*(x[rows].transpose(0, 1) for x, rows in ((q, i), (k, j), (v, j))))
            for i, j in zip(*spans, strict=True)
        ]
        return torch.cat(parts, dim=1).transpose(0, 1).flatten(1)

    def _spans(self, packed: dict, kind: str) -> list[slice]:
        ends = packed[f"cu_seqlens_{kind}"].tolist()
        assert all(start < end for start, end in pairwise(ends)), "a grid of empty documents"
        assert packed[f"max_seqlen_{kind}"] == max(end - start for start, end in pairwise(ends))
        return [slice(start, end) for start, end in pairwise(ends)]

    def _document(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(k.shape[1])
        before = place[k.shape[1] - q.shape[1] :, None] - place
        seen = before >= 0 if self.window is None else (before >= 0) & (before <= self.window[0])
        return (q @ k.mT * self.scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v


class _Module(types.ModuleType):
    """Whatever else is imported from it is an empty class."""

    def __init__(self, name: str, **members):
        super().__init__(name)
        self.__spec__, self.__path__ = importlib.machinery.ModuleSpec(name, None), []
        self.__dict__.update(members)
        sys.modules[name] = self

    def __getattr__(self, name: str) -> type:
        if name.startswith("_") or name == "optimizers":
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


def install() -> None:
    """Make it what `import transformer_engine` gives."""
    modules = {name: _Module(f"transformer_engine.{name}") for name in NAMES}
    modules[""] = _Module("transformer_engine", __version__="2.11.0")
    for name, module in modules.items():
        if name:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, module)
    for layer in (Linear, RMSNorm, DotProductAttention, autocast):
        setattr(modules["pytorch"], layer.__name__, layer)
    for recipe in (Float8CurrentScaling, Float8BlockScaling, QParams, Format):
        setattr(modules["common.recipe"], recipe.__name__, recipe)
