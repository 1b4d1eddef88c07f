"""Every parameter of a HybridModel: its name, shape, how tensor parallelism shards it and how it is initialised.

The one table that initialisation, checkpoints, planning and the exchange with Hugging Face read; no torch in here.
Names are global: they carry the sub-layer's index in the whole model and know nothing of the parallel layout.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from prism_mcore.model.spec import LAYER_NAMES, ModelSpec


@dataclass(frozen=True)
class Initial:
    """How a tensor is drawn: Initial("normal", (0.02,)) has standard deviation 0.02; model/tensors.py draws it."""

    kind: Literal["ones", "zeros", "normal", "uniform", "a_log", "dt_bias"]
    numbers: tuple[float, ...] = ()


ONES, ZEROS = Initial("ones"), Initial("zeros")


@dataclass(frozen=True)
class Parameter:
    """One tensor of the whole model, before any sharding.

    `layers.0.mixer.gate_up.weight` of a 4-wide model with an 8-wide MLP:
        Parameter(shape=(16, 4), tp_axis=0, parts=(8, 8))    # rank r of 2 holds gate[4r:4r+4] then up[4r:4r+4]
    """

    shape: tuple[int, ...]  # of the whole model, vocabulary unpadded
    initial: Initial  # of the whole tensor, fp32
    tp_axis: int | None = None  # None: every tensor-parallel rank holds all of it
    parts: tuple[int, ...] = ()  # sizes along tp_axis of the parts that are sharded each on its own; () is one part
    names: tuple[str, ...] = ()  # of the parts, for checkpoints: a part is stored as a tensor of its own
    fp32: bool = False  # kept in fp32 whatever the precision of the run
    vocabulary: bool = False  # axis 0 is padded to a multiple of the tensor-parallel size


def parameters(spec: ModelSpec, tp: int = 1) -> dict[str, Parameter]:
    """All parameters of the model by global name, in the order of the forward pass."""
    table = {"embedding.weight": _vocabulary(spec)}
    for index, kind in enumerate(spec.pattern):
        prefix = f"layers.{index}."
        table[prefix + "norm.weight"] = Parameter((spec.hidden_size,), ONES)
        for name, parameter in _MIXERS[kind](spec, tp).items():
            table[f"{prefix}mixer.{name}"] = parameter
    table["final_norm.weight"] = Parameter((spec.hidden_size,), ONES)
    if not spec.tied_embeddings:
        table["output.weight"] = _vocabulary(spec)
    return table


def large_matrices(spec: ModelSpec, kind: str, tp: int) -> dict[str, tuple[float, float]]:
    """(rows, columns) on a rank of the weights of a sub-layer's linears, by name; Mamba's in_proj is one product."""
    shapes: dict[str, tuple[float, float]] = {}
    for name, parameter in _MIXERS[kind](spec, tp).items():
        if len(parameter.shape) == 2 and not name.startswith("conv"):
            cut = [size / tp if axis == parameter.tp_axis else size for axis, size in enumerate(parameter.shape)]
            matrix = name.split(".")[0].removesuffix("_bc")
            shapes[matrix] = (cut[0] + shapes.get(matrix, (0, 0))[0], cut[1])
    return shapes


def names_matching(spec: ModelSpec, patterns: Iterable[str]) -> set[str]:
    """Parameters of types of sub-layers (`attention`), or whose names match a pattern; KeyError where one has none."""
    chosen: set[str] = set()
    names = {name: name.split(".") for name in parameters(spec)}
    types = {name: LAYER_NAMES[spec.pattern[int(p[1])]] for name, p in names.items() if p[0] == "layers"}
    for pattern in patterns:
        found = {name for name in names if types.get(name) == pattern or fnmatchcase(name, pattern)}
        if not found:
            raise KeyError(pattern)
        chosen |= found
    return chosen


def padded_vocabulary(spec: ModelSpec, tp: int) -> int:
    """Rows of the embedding and of the output layer over all tensor-parallel ranks."""
    return -(-spec.vocab_size // tp) * tp


def _vocabulary(spec: ModelSpec) -> Parameter:
    shape = (spec.vocab_size, spec.hidden_size)
    return Parameter(shape, _normal(spec.initializer_range), tp_axis=0, vocabulary=True)


def _attention(spec: ModelSpec, tp: int) -> dict[str, Parameter]:
    # Rows of qkv: for each key/value head its query heads, then its key, then its value, as megatron-core has them.
    rows = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    width = spec.num_heads * spec.head_dim
    table = {"qkv.weight": Parameter((rows, spec.hidden_size), _normal(spec.initializer_range), tp_axis=0)}
    if spec.qkv_bias:
        table["qkv.bias"] = Parameter((rows,), ZEROS, tp_axis=0)
    if spec.qk_norm:
        table |= {f"{name}_norm.weight": Parameter((spec.head_dim,), ONES) for name in "qk"}
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
    conv = Initial("uniform", (1 / math.sqrt(spec.conv_kernel),))
    # One SSM group cannot be sharded: every rank holds its B and C, and their gradients are summed over ranks.
    bc = None if spec.ssm_groups == 1 else 0
    zdtx = Parameter((2 * inner + heads, spec.hidden_size), normal, 0, (inner, heads, inner), ("z", "dt", "x"))
    table = {
        "in_proj.weight": zdtx,
        "in_proj_bc.weight": Parameter((2 * state, spec.hidden_size), normal, bc, (state, state), ("B", "C")),
        "conv_x.weight": Parameter((inner, spec.conv_kernel), conv, 0),
        "conv_bc.weight": Parameter((2 * state, spec.conv_kernel), conv, bc, (state, state), ("B", "C")),
    }
    if spec.conv_bias:
        table["conv_x.bias"] = Parameter((inner,), ZEROS, 0)
        table["conv_bc.bias"] = Parameter((2 * state,), ZEROS, bc, (state, state), ("B", "C"))
    return {
        **table,
        "dt_bias": Parameter((heads,), Initial("dt_bias", (spec.dt_min, spec.dt_max, spec.dt_floor)), 0, fp32=True),
        "A_log": Parameter((heads,), Initial("a_log"), 0, fp32=True),
        "D": Parameter((heads,), ONES, 0, fp32=True),
        "norm.weight": Parameter((inner,), ONES, 0),
        "out_proj.weight": Parameter((spec.hidden_size, inner), _residual(spec), 1),
    }


_MIXERS = {"*": _attention, "-": _mlp, "M": _mamba}


def _normal(std: float) -> Initial:
    return Initial("normal", (std,))


def _residual(spec: ModelSpec) -> Initial:
    # GPT-2's rule: what is added to the residual stream shrinks with the number of additions.
    return _normal(spec.initializer_range / math.sqrt(len(spec.pattern)))
