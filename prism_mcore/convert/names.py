"""Hugging Face's name of every tensor and which of our rows it is made of, family by family.

A *key* is what a checkpoint stores: the name of a parameter (`model/parameters.py`), or `<name>.<part>` where the
parameter is put together of parts: `layers.3.mixer.gate_up.weight.gate`. Every tensor of a Hugging Face directory is a
few runs of whole rows of keys, one after the other; nothing is ever transposed, scaled or summed.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from prism_mcore.model.parameters import Parameter, parameters
from prism_mcore.model.spec import ModelSpec

Shape = tuple[int, ...]


class ExchangeError(ValueError):
    """Weights cannot be read or written; the message names the file and the tensor."""


@dataclass(frozen=True)
class Run:
    """Rows [start, start + rows) of a key."""

    key: str
    start: int
    rows: int


@dataclass(frozen=True)
class HFTensor:
    """One tensor of a Hugging Face directory.

    `model.layers.0.mamba.in_proj.weight` of Granite-4.0-H-Micro, [z | x | B | C | dt]:
        HFTensor(shape=(8512, 2048), runs=(Run("layers.0.mixer.in_proj.weight.z", 0, 4096), ...))
    """

    shape: Shape
    runs: tuple[Run, ...]  # in the order of its rows
    optional: bool = False  # a tied output layer: the same numbers as the embedding, where a directory has it at all


# --- the tables -------------------------------------------------------------------------------------------------------
# Left: name in the directory after "<prefix>layers.<layer>.". Right: our keys after "layers.<sub-layer>.", in the order
# of the rows. `Q`, `K` and `V` are the rows of our qkv: for each key/value head its queries, its key, its value.

Q, K, V = "mixer.qkv.weight[q]", "mixer.qkv.weight[k]", "mixer.qkv.weight[v]"

Table = dict[str, list[str]]

ATTENTION: Table = {
    "input_layernorm.weight": ["norm.weight"],
    "self_attn.q_proj.weight": [Q],
    "self_attn.k_proj.weight": [K],
    "self_attn.v_proj.weight": [V],
    "self_attn.o_proj.weight": ["mixer.out_proj.weight"],
}
MLP: Table = {
    "post_attention_layernorm.weight": ["norm.weight"],
    "mlp.gate_proj.weight": ["mixer.gate_up.weight.gate"],
    "mlp.up_proj.weight": ["mixer.gate_up.weight.up"],
    "mlp.down_proj.weight": ["mixer.down.weight"],
}
SHARED_MLP: Table = {
    "post_attention_layernorm.weight": ["norm.weight"],
    "shared_mlp.input_linear.weight": ["mixer.gate_up.weight.gate", "mixer.gate_up.weight.up"],
    "shared_mlp.output_linear.weight": ["mixer.down.weight"],
}
MAMBA: Table = {  # after "mamba." or "mixer."
    "in_proj.weight": [
        "mixer.in_proj.weight.z",
        "mixer.in_proj.weight.x",
        "mixer.in_proj_bc.weight.B",
        "mixer.in_proj_bc.weight.C",
        "mixer.in_proj.weight.dt",
    ],
    "conv1d.weight": ["mixer.conv_x.weight", "mixer.conv_bc.weight.B", "mixer.conv_bc.weight.C"],
    "conv1d.bias": ["mixer.conv_x.bias", "mixer.conv_bc.bias.B", "mixer.conv_bc.bias.C"],
    "dt_bias": ["mixer.dt_bias"],
    "A_log": ["mixer.A_log"],
    "D": ["mixer.D"],
    "norm.weight": ["mixer.norm.weight"],
    "out_proj.weight": ["mixer.out_proj.weight"],
}


def _under(module: str, table: Table) -> Table:
    return {f"{module}.{name}": keys for name, keys in table.items()}


@dataclass(frozen=True)
class Family:
    """How one family names its tensors."""

    layers: dict[str, Table]  # by kind of sub-layer
    sublayers: int = 2  # of ours, in one layer of theirs
    prefixes: tuple[str, ...] = ("model.",)  # the first is the one to write, all are read
    embedding: str = "embed_tokens.weight"
    final_norm: str = "norm.weight"
    output: str = "lm_head.weight"


DENSE = Family({"*": ATTENTION, "-": MLP})
GRANITE_HYBRID = Family(
    {
        "*": ATTENTION,
        "-": SHARED_MLP,
        "M": {"input_layernorm.weight": ["norm.weight"], **_under("mamba", MAMBA)},
    }
)
NEMOTRON_H = Family(
    {
        "*": {
            "norm.weight": ["norm.weight"],
            "mixer.q_proj.weight": [Q],
            "mixer.k_proj.weight": [K],
            "mixer.v_proj.weight": [V],
            "mixer.o_proj.weight": ["mixer.out_proj.weight"],
        },
        "-": {
            "norm.weight": ["norm.weight"],
            "mixer.up_proj.weight": ["mixer.up.weight"],
            "mixer.down_proj.weight": ["mixer.down.weight"],
        },
        "M": {"norm.weight": ["norm.weight"], **_under("mixer", MAMBA)},
    },
    sublayers=1,
    # What NVIDIA published and transformers writes; and what transformers 5 calls them in memory.
    prefixes=("backbone.", "model."),
    embedding="embeddings.weight",
    final_norm="norm_f.weight",
)
FAMILIES = {
    "llama": DENSE,
    "mistral": DENSE,
    "granite": DENSE,
    "granitemoehybrid": GRANITE_HYBRID,
    "nemotron_h": NEMOTRON_H,
}


# --- reading them -----------------------------------------------------------------------------------------------------


def hf_tensors(spec: ModelSpec, names: Collection[str] = ()) -> dict[str, HFTensor]:
    """Every tensor of the model in Hugging Face's naming, in the order of the forward pass.

    names: those of a directory, where a family is written in more than one way.
    """
    family = FAMILIES[spec.family]
    prefix = next((p for p in family.prefixes if p + family.embedding in names), family.prefixes[0])
    sizes = keys(spec)
    tensors = {
        prefix + family.embedding: _tensor("embedding.weight", [Run("embedding.weight", 0, spec.vocab_size)], sizes)
    }
    for index, kind in enumerate(spec.pattern):
        layer = f"{prefix}layers.{index // family.sublayers}."
        for name, ours in family.layers[kind].items():
            runs = [run for key in ours for run in _runs(f"layers.{index}.{key}", spec, sizes)]
            if runs:
                tensors[layer + name] = _tensor(name, runs, sizes)
    tensors[prefix + family.final_norm] = _tensor("", [Run("final_norm.weight", 0, spec.hidden_size)], sizes)
    output = "embedding.weight" if spec.tied_embeddings else "output.weight"
    tensors[family.output] = HFTensor(sizes[output], (Run(output, 0, spec.vocab_size),), optional=spec.tied_embeddings)
    return tensors


def keys(spec: ModelSpec) -> dict[str, Shape]:
    """The shape of every key, vocabulary unpadded, in the order of the forward pass."""
    return {key: shape for name, p in parameters(spec).items() for key, shape in parts(name, p).items()}


def parts(name: str, parameter: Parameter) -> dict[str, Shape]:
    """The keys of one parameter and their shapes, in the order of its rows."""
    if not parameter.parts:
        return {name: parameter.shape}
    tail = parameter.shape[1:]
    return {f"{name}.{part}": (size, *tail) for part, size in zip(parameter.names, parameter.parts, strict=True)}


def _runs(key: str, spec: ModelSpec, sizes: dict[str, Shape]) -> Iterator[Run]:
    """The rows of one entry of a table; none where the model does not have it (a convolution without bias)."""
    key, bracket, which = key.partition("[")
    if bracket:
        p, queries = spec.head_dim, spec.num_heads // spec.num_kv_heads
        first, count = {"q": (0, queries), "k": (queries, 1), "v": (queries + 1, 1)}[which[0]]
        for head in range(spec.num_kv_heads):
            yield Run(key, (head * (queries + 2) + first) * p, count * p)
    elif key in sizes:
        yield Run(key, 0, sizes[key][0])


def _tensor(name: str, runs: list[Run], sizes: dict[str, Shape]) -> HFTensor:
    tail = sizes[runs[0].key][1:]
    if name.endswith("conv1d.weight"):
        tail = (1, *tail)  # torch's Conv1d: [channels, channels / groups = 1, kernel]
    return HFTensor((sum(run.rows for run in runs), *tail), tuple(runs))
