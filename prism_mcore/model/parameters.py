"""Every parameter of a HybridModel: its name, shape, how tensor parallelism cuts it and how it is initialised.

The one table that initialisation, checkpoints, planning and the exchange with Hugging Face read. Names are global: they
carry the sub-layer's index in the whole model and know nothing of the parallel layout.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_mcore.model.spec import ModelSpec

Init = Callable[[tuple[int, ...], torch.Generator], Tensor]


@dataclass(frozen=True)
class Parameter:
    """One tensor of the whole model, before any parallel cut.

    `layers.0.mixer.gate_up.weight` of a 4-wide model with an 8-wide MLP:
        Parameter(shape=(16, 4), tp_axis=0, parts=(8, 8))    # rank r of 2 holds gate[4r:4r+4] then up[4r:4r+4]
    """

    shape: tuple[int, ...]  # of the whole model, vocabulary unpadded
    init: Init  # draws the whole tensor, fp32
    tp_axis: int | None = None  # None: every tensor-parallel rank holds all of it
    parts: tuple[int, ...] = ()  # sizes along tp_axis of the parts that are cut each on its own; () is one part
    names: tuple[str, ...] = ()  # of the parts, for checkpoints: a part is stored as a tensor of its own
    fp32: bool = False  # kept in fp32 whatever the precision of the run
    vocabulary: bool = False  # axis 0 is padded to a multiple of the tensor-parallel size


def parameters(spec: ModelSpec, tp: int = 1) -> dict[str, Parameter]:
    """All parameters of the model by global name, in the order of the forward pass."""
    table = {"embedding.weight": _vocabulary(spec)}
    for index, kind in enumerate(spec.pattern):
        prefix = f"layers.{index}."
        table[prefix + "norm.weight"] = Parameter((spec.hidden_size,), _ones)
        for name, parameter in _MIXERS[kind](spec, tp).items():
            table[f"{prefix}mixer.{name}"] = parameter
    table["final_norm.weight"] = Parameter((spec.hidden_size,), _ones)
    if not spec.tied_embeddings:
        table["output.weight"] = _vocabulary(spec)
    return table


def padded_vocabulary(spec: ModelSpec, tp: int) -> int:
    """Rows of the embedding and of the output layer over all tensor-parallel ranks."""
    return -(-spec.vocab_size // tp) * tp


def draw(name: str, parameter: Parameter, seed: int) -> Tensor:
    """The initial value of the whole tensor, fp32 on the CPU: a pure function of (seed, name), for any layout."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return parameter.init(parameter.shape, generator)


def shard(whole: Tensor, parameter: Parameter, rank: int, tp: int) -> Tensor:
    """The slice of the whole tensor that tensor-parallel rank `rank` of `tp` holds; vocabulary padded with zeros."""
    if parameter.vocabulary and whole.shape[0] % tp:
        padding = whole.new_zeros(tp - whole.shape[0] % tp, *whole.shape[1:])
        whole = torch.cat([whole, padding])
    if parameter.tp_axis is None or tp == 1:
        return whole
    axis = parameter.tp_axis
    parts = whole.split(parameter.parts or (whole.shape[axis],), dim=axis)
    return torch.cat([part.chunk(tp, dim=axis)[rank] for part in parts], dim=axis)


def gather(shards: list[Tensor], parameter: Parameter) -> Tensor:
    """The whole tensor from all tensor-parallel ranks' slices, vocabulary padding removed; the inverse of `shard`."""
    if parameter.tp_axis is None or len(shards) == 1:
        whole = shards[0]
    else:
        axis, tp = parameter.tp_axis, len(shards)
        sizes = [size // tp for size in parameter.parts] or [shards[0].shape[axis]]
        by_part = zip(*(piece.split(sizes, dim=axis) for piece in shards), strict=True)
        whole = torch.cat([torch.cat(pieces, dim=axis) for pieces in by_part], dim=axis)
    return whole[: parameter.shape[0]] if parameter.vocabulary else whole


def _vocabulary(spec: ModelSpec) -> Parameter:
    shape = (spec.vocab_size, spec.hidden_size)
    return Parameter(shape, _normal(spec.initializer_range), tp_axis=0, vocabulary=True)


def _attention(spec: ModelSpec, tp: int) -> dict[str, Parameter]:
    # Rows of qkv: for each key/value head its query heads, then its key, then its value, as megatron-core has them.
    rows = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    width = spec.num_heads * spec.head_dim
    table = {"qkv.weight": Parameter((rows, spec.hidden_size), _normal(spec.initializer_range), tp_axis=0)}
    if spec.qkv_bias:
        table["qkv.bias"] = Parameter((rows,), _zeros, tp_axis=0)
    if spec.qk_norm:
        table |= {f"{name}_norm.weight": Parameter((spec.head_dim,), _ones) for name in "qk"}
    return {**table, "out_proj.weight": Parameter((spec.hidden_size, width), _residual(spec), tp_axis=1)}


def _mlp(spec: ModelSpec, tp: int) -> dict[str, Parameter]:
    normal = _normal(spec.initializer_range)
    if spec.activation == "swiglu":
        up = {
            "gate_up.weight": Parameter(
                (2 * spec.ffn_size, spec.hidden_size), normal, 0, (spec.ffn_size,) * 2, ("gate", "up")
            )
        }
    else:
        up = {"up.weight": Parameter((spec.ffn_size, spec.hidden_size), normal, 0)}
    return {**up, "down.weight": Parameter((spec.hidden_size, spec.ffn_size), _residual(spec), 1)}


def _mamba(spec: ModelSpec, tp: int) -> dict[str, Parameter]:
    heads, state = spec.mamba_num_heads, spec.ssm_groups * spec.ssm_state_size
    inner = heads * spec.mamba_head_dim
    normal = _normal(spec.initializer_range)
    conv = _uniform(1 / math.sqrt(spec.conv_kernel))
    # One SSM group cannot be cut over ranks: every rank holds its B and C, and their gradients are summed over ranks.
    bc = None if spec.ssm_groups == 1 else 0
    zdtx = Parameter((2 * inner + heads, spec.hidden_size), normal, 0, (inner, heads, inner), ("z", "dt", "x"))
    table = {
        "in_proj.weight": zdtx,
        "in_proj_bc.weight": Parameter((2 * state, spec.hidden_size), normal, bc, (state, state), ("B", "C")),
        "conv_x.weight": Parameter((inner, spec.conv_kernel), conv, 0),
        "conv_bc.weight": Parameter((2 * state, spec.conv_kernel), conv, bc, (state, state), ("B", "C")),
    }
    if spec.conv_bias:
        table["conv_x.bias"] = Parameter((inner,), _zeros, 0)
        table["conv_bc.bias"] = Parameter((2 * state,), _zeros, bc, (state, state), ("B", "C"))
    return {
        **table,
        "dt_bias": Parameter((heads,), _dt_bias(spec), 0, fp32=True),
        "A_log": Parameter((heads,), _a_log, 0, fp32=True),
        "D": Parameter((heads,), _ones, 0, fp32=True),
        "norm.weight": Parameter((inner,), _ones, 0),
        "out_proj.weight": Parameter((spec.hidden_size, inner), _residual(spec), 1),
    }


_MIXERS = {"*": _attention, "-": _mlp, "M": _mamba}


def _ones(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.ones(shape)


def _zeros(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.zeros(shape)


def _normal(std: float) -> Init:
    return lambda shape, generator: torch.randn(shape, generator=generator).mul_(std)


def _uniform(bound: float) -> Init:
    return lambda shape, generator: torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound)


def _residual(spec: ModelSpec) -> Init:
    # GPT-2's rule: what is added to the residual stream shrinks with the number of additions.
    return _normal(spec.initializer_range / math.sqrt(len(spec.pattern)))


def _a_log(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.arange(1, shape[0] + 1, dtype=torch.float32).log_()  # Mamba-2: A = -1, -2, ... -heads


def _dt_bias(spec: ModelSpec) -> Init:
    # Mamba-2: softplus(dt_bias) is log-uniform in [dt_min, dt_max].
    low, high = math.log(spec.dt_min), math.log(spec.dt_max)

    def init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        dt = (torch.rand(shape, generator=generator) * (high - low) + low).exp_().clamp_(min=spec.dt_floor)
        return dt + torch.log(-torch.expm1(-dt))

    return init
