"""Hugging Face directories in and out of a running model: every rank reads its own slices, one rank writes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prism_mcore.convert.layout import Places, held_columns, held_rows
from prism_mcore.convert.names import ExchangeError, HFTensor
from prism_mcore.convert.source import Source, read_source
from prism_mcore.model.hybrid import HybridModel
from prism_mcore.model.parameters import Parameter
from prism_mcore.parallel import Groups


def load_hf(path: str | Path, chunks: list[HybridModel], groups: Groups) -> None:
    """Fill the model with the weights of a Hugging Face directory; every rank calls it and reads only its own slices.

    Numbers are cast from the directory's dtypes to the parameters'; rows that pad the vocabulary become zeros. Raises
    ExchangeError, the same on every rank, for files that are missing, cut off or not safetensors, for a tensor that
    the model lacks or has in another shape, and for one the model needs and the directory lacks.
    """
    with agreed():
        source = read_source(Path(path))
        spec = chunks[0].spec
        if source.spec().family != spec.family:
            raise ExchangeError(f"{path} is a {source.spec().family} model; the model to fill is {spec.family}")
        with _Reader(source) as reader:
            _fill(chunks, groups, source.tensors(spec), reader)


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """What one rank finds wrong, every rank raises: none waits for one that is gone."""
    failure = ""
    try:
        yield
    except (ExchangeError, OSError) as error:
        failure = str(error)
    failures: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    told = sorted({text for text in failures if text})
    if told:
        raise ExchangeError("; ".join(told))


class _Reader(contextlib.ExitStack):
    """Slices of the tensors of a directory; files are opened when something of them is first wanted."""

    def __init__(self, source: Source):
        super().__init__()
        self.folder = source.folder
        self.files = {name: file for file, name, _ in source.entries()}
        self.open: dict[str, safe_open] = {}

    def read(self, name: str, rows: slice, columns: slice) -> Tensor:
        """Some rows and columns of a tensor, as [rows, ...] views of the file."""
        file = self.files[name]
        try:
            if file not in self.open:
                self.open[file] = self.enter_context(safe_open(self.folder / file, framework="pt"))
            tensor = self.open[file].get_slice(name)
            return tensor[rows] if columns == slice(None) else tensor[rows, columns]
        except SafetensorError as error:
            raise ExchangeError(f"{self.folder / file}: cannot read {name}: {error}") from error


@torch.no_grad()
def _fill(chunks: list[HybridModel], groups: Groups, tensors: dict[str, HFTensor], reader: _Reader) -> None:
    places = Places(tensors)
    for chunk in chunks:
        for name, weight, parameter in chunk.table():
            _fill_one(name, weight, parameter, groups, places, reader)
            if name == "embedding.weight":
                _check_duplicates(name, parameter, groups, tensors, places, reader)


def _fill_one(
    name: str, weight: nn.Parameter, parameter: Parameter, groups: Groups, places: Places, reader: _Reader
) -> None:
    columns = held_columns(parameter, groups.tp_rank, groups.tp_size)
    filled = 0
    for run, row in held_rows(name, parameter, groups.tp_rank, groups.tp_size):
        for copy in places.find(run, row):
            read = reader.read(copy.name, slice(copy.hf_row, copy.hf_row + copy.rows), columns)
            target = weight[copy.row : copy.row + copy.rows]
            target.copy_(read.reshape(target.shape))
            filled += copy.rows
        assert filled == row + run.rows, f"{filled} rows of {name} were found, not {row + run.rows}"
    weight[filled:].zero_()  # what pads the vocabulary


def _check_duplicates(
    name: str,
    parameter: Parameter,
    groups: Groups,
    tensors: dict[str, HFTensor],
    places: Places,
    reader: _Reader,
) -> None:
    """A directory may hold a tied output layer beside the embedding: they must be equal."""
    for duplicate, tensor in tensors.items():
        for run, _ in held_rows(name, parameter, groups.tp_rank, groups.tp_size) if tensor.optional else ():
            for copy in places.find(run):
                rows = slice(copy.hf_row, copy.hf_row + copy.rows)
                one, other = reader.read(copy.name, rows, slice(None)), reader.read(duplicate, rows, slice(None))
                if not torch.equal(one, other):
                    raise ExchangeError(
                        f"{reader.folder / reader.files[duplicate]}: {duplicate} differs from {copy.name}, but"
                        " config.json says tie_word_embeddings=true; set it to false in a copy to keep both"
                    )
