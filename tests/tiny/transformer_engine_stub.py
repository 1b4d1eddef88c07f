"""As much of Transformer Engine as megatron-core's wrappers import and call, in plain torch: `install()` before both.

Written after Transformer Engine 2.8's signatures. It knows fewer arguments than the real one on purpose: a call with
another name, layout or mask is an error.
"""

# t packed tokens, h query heads, k key/value heads, p head_dim

import importlib.machinery
import sys
import types
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES = """
common common.recipe pytorch pytorch.attention pytorch.attention.rope pytorch.cpu_offload pytorch.cross_entropy
pytorch.distributed pytorch.float8_tensor pytorch.fp8 pytorch.graph pytorch.jit pytorch.module pytorch.module.base
pytorch.ops pytorch.permutation pytorch.router pytorch.tensor pytorch.tensor.utils pytorch.utils
""".split()  # noqa: SIM905


class Linear(nn.Module):
    def __init__(
        self, in_features, out_features, *, device, params_dtype, bias, return_bias, parallel_mode, tp_size, **others
    ):
        super().__init__()
        assert (return_bias, tp_size) == (False, 1) and parallel_mode in ("column", "row")
        self.sequence_parallel = others["sequence_parallel"]
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=params_dtype, device=device)) if bias else torch.Tensor()
        )

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias if len(self.bias) else None)


class RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps, sequence_parallel, zero_centered_gamma, params_dtype, device):
        super().__init__()
        assert not zero_centered_gamma
        self.eps, self.weight = eps, nn.Parameter(torch.empty(hidden_size, dtype=params_dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class DotProductAttention(nn.Module):
    def __init__(self, num_attention_heads, kv_channels, *, softmax_scale, attention_dropout, **others):
        super().__init__()
        assert attention_dropout == 0 and others["tp_size"] == 1
        self.heads, self.scale, self.window = num_attention_heads, softmax_scale, others.get("window_size")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: None, **packed) -> Tensor:
        """q [t, h, p], k and v [t, k, p] -> [t, h * p]."""
        assert (packed["qkv_format"], packed["attn_mask_type"], attention_mask) == ("thd", "padding_causal", None)
        ends = packed["cu_seqlens_q"].tolist()
        assert all(start < end for start, end in pairwise(ends)), "a grid of empty documents"
        assert packed["max_seqlen_q"] == max(end - start for start, end in pairwise(ends))
        k, v = (x.repeat_interleave(self.heads // x.shape[1], dim=1) for x in (k, v))
        parts = [self._document(*(x[start:end].transpose(0, 1) for x in (q, k, v))) for start, end in pairwise(ends)]
        return torch.cat(parts, dim=1).transpose(0, 1).flatten(1)

    def _document(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[1])
        before = place[:, None] - place
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
    modules[""] = _Module("transformer_engine", __version__="2.8.0")
    for name, module in modules.items():
        if name:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, module)
    for layer in (Linear, RMSNorm, DotProductAttention):
        setattr(modules["pytorch"], layer.__name__, layer)
