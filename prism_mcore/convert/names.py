"""Hugging Face's name of every tensor and which of our rows it is made of.

A *key* is what a checkpoint stores: the name of a parameter (`model/parameters.py`), or `<name>.<part>` where the
parameter is put together of parts: `layers.3.mixer.gate_up.weight.gate`. Every tensor of a Hugging Face directory is a
few runs of whole rows of keys, one after the other; nothing is ever transposed, scaled or summed. How each family calls
its tensors is in `model/families/`.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from prism_mcore.model.parameters import Parameter, parameters
from prism_mcore.model.spec import ModelSpec, families

Shape = tuple[int, ...]


class ExchangeError(ValueError):
    """Weights cannot be read or written; the message names the file and the tensor."""


@dataclass(frozen=True)
class RowRange:
    """Rows [start, start + rows) of a key."""

    key: str
    start: int
    rows: int


@dataclass(frozen=True)
class HFTensor:
    """One tensor of a Hugging Face directory.

    `model.layers.0.mamba.in_proj.weight` of Granite-4.0-H-Micro, [z | x | B | C | dt]:
        HFTensor(shape=(8512, 2048), runs=(RowRange("layers.0.mixer.in_proj.weight.z", 0, 4096), ...))
    """

    shape: Shape
    runs: tuple[RowRange, ...]  # in the order of its rows
    optional: bool = False  # a tied output layer: the same numbers as the embedding, where a directory has it at all


def hf_tensors(spec: ModelSpec, names: Collection[str] = ()) -> dict[str, HFTensor]:
    """Every tensor of the model in Hugging Face's naming, in the order of the forward pass.

    names: those of a directory, where a family is written in more than one way.
    """
    family = families()[spec.family]
    prefix = next((p for p in family.prefixes if p + family.embedding in names), family.prefixes[0])
    sizes = keys(spec)
    tensors = {
        prefix + family.embedding: _tensor(
            "embedding.weight", [RowRange("embedding.weight", 0, spec.vocab_size)], sizes
        )
    }
    for index, kind in enumerate(spec.pattern):
        layer = f"{prefix}layers.{index // family.sublayers}."
        for name, ours in family.layers[kind].items():
            runs = [run for key in ours for run in _runs(f"layers.{index}.{key}", spec, sizes)]
            if runs:
                tensors[layer + name] = _tensor(name, runs, sizes)
    tensors[prefix + family.final_norm] = _tensor("", [RowRange("final_norm.weight", 0, spec.hidden_size)], sizes)
    output = "embedding.weight" if spec.tied_embeddings else "output.weight"
    tensors[family.output] = HFTensor(
        sizes[output], (RowRange(output, 0, spec.vocab_size),), optional=spec.tied_embeddings
    )
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


def _runs(key: str, spec: ModelSpec, sizes: dict[str, Shape]) -> Iterator[RowRange]:
    """The rows of one entry of a table; none where the model does not have it (a convolution without bias)."""
    key, bracket, which = key.partition("[")
    if key not in sizes:
        return
    if bracket:
        p, queries = spec.head_dim, spec.num_heads // spec.num_kv_heads
        first, count = {"q": (0, queries), "k": (queries, 1), "v": (queries + 1, 1)}[which[0]]
        for head in range(spec.num_kv_heads):
            yield RowRange(key, (head * (queries + 2) + first) * p, count * p)
    else:
        yield RowRange(key, 0, sizes[key][0])


def _tensor(name: str, runs: list[RowRange], sizes: dict[str, Shape]) -> HFTensor:
    tail = sizes[runs[0].key][1:]
    if name.endswith("conv1d.weight"):
        tail = (1, *tail)  # torch's Conv1d: [channels, channels / groups = 1, kernel]
    return HFTensor((sum(run.rows for run in runs), *tail), tuple(runs))
