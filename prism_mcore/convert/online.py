"""Hugging Face directories in and out of a running model: every rank reads its own slices, one rank writes."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prism_mcore.checkpoint.safetensors import Entry
from prism_mcore.convert.names import ExchangeError, HFTensor, parts
from prism_mcore.convert.read import HFDirectory, HFTensors, read_directory
from prism_mcore.convert.rows import Places, held_columns, held_rows, overlap, runs_within
from prism_mcore.convert.write import blocks, is_wider, rounding, write_directory
from prism_mcore.model.build import chunks_of
from prism_mcore.model.hybrid import HybridModel
from prism_mcore.model.parameters import Parameter, parameters
from prism_mcore.model.settings import BuildSettings
from prism_mcore.model.spec import read_spec
from prism_mcore.parallel import Groups

log = logging.getLogger(__name__)


def model_from_hf(
    path: str | Path, settings: BuildSettings, groups: Groups, device: torch.device, *, seq_len: int = 1
) -> list[HybridModel]:
    """This rank's chunks of the model in a Hugging Face directory; every rank calls it.

    seq_len: tokens of a sequence, for which `parallel.split=auto` evens the stages. Raises as `load_hf` and
    `chunks_of` do.
    """
    chunks = chunks_of(settings, read_spec(path), groups, device, seq_len=seq_len)
    load_hf(path, chunks, groups)
    return chunks


def load_hf(path: str | Path, chunks: list[HybridModel], groups: Groups) -> None:
    """Fill the model with the weights of a Hugging Face directory; every rank calls it and reads only its own slices.

    Numbers are cast from the directory's dtypes to the parameters'; rows that pad the vocabulary become zeros. Raises
    ExchangeError, the same on every rank, for files that are missing, cut off or not safetensors, for a tensor that
    the model lacks or has in another shape, and for one the model needs and the directory lacks.
    """
    with agreed():
        source = read_directory(Path(path))
        spec = chunks[0].spec
        if source.spec().family != spec.family:
            raise ExchangeError(f"{path} is a {source.spec().family} model; the model to fill is {spec.family}")
        with _Reader(source) as reader:
            _fill(chunks, groups, source.tensors(spec), reader)
            _check_tied(chunks, groups, source)


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

    def __init__(self, source: HFDirectory):
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


def _check_tied(chunks: list[HybridModel], groups: Groups, source: HFDirectory) -> None:
    """The ranks that hold the embedding compare its rows with a tied output layer, where the directory has one."""
    spec = chunks[0].spec
    with HFTensors(source) as tensors:
        for chunk in chunks:
            if chunk.pre_process:
                parameter = parameters(spec)["embedding.weight"]
                for run, _ in held_rows("embedding.weight", parameter, groups.tp_rank, groups.tp_size):
                    tensors.check_tied(source.tensors(spec), run.start, run.start + run.rows)


# --- writing ----------------------------------------------------------------------------------------------------------


def save_hf(chunks: list[HybridModel], groups: Groups, out: str | Path, source: HFDirectory) -> None:
    """Write the running model as a Hugging Face directory in the layout of `source`; every rank calls it.

    Rank 0 writes, cast to the dtypes of the layout; the others send it their slices, a block at a time. Raises
    ExchangeError on every rank where the directory cannot be written; then nothing is left of it.
    """
    with agreed():
        tensors = source.tensors(chunks[0].spec)
    gatherer = _Gatherer(chunks, groups, source, tensors)
    if groups.rank == 0 and (rounded := gatherer.rounded(source)):
        log.warning("note: %s", rounding(rounded, out))
    with agreed():
        if groups.rank == 0:
            try:
                write_directory(Path(out), source, lambda name, start, rows: gatherer.next_block(rows))
            finally:
                gatherer.exhaust()  # after an error the others must not wait for ever
        else:
            gatherer.exhaust()


@dataclass(frozen=True)
class _Holder:
    """What a rank holds, as every rank knows it."""

    rank: int
    tp_rank: int
    first: bool  # of the data-parallel and context-parallel replicas
    names: frozenset[str]


class _Gatherer:
    """Blocks of the whole model's tensors on rank 0, sent by the ranks that hold them; all go through one order."""

    def __init__(self, chunks: list[HybridModel], groups: Groups, source: HFDirectory, tensors: dict[str, HFTensor]):
        self.groups, self.tensors = groups, tensors
        self.table, self.dtype = parameters(chunks[0].spec), chunks[0].config.params_dtype
        self.owner = {key: name for name, parameter in self.table.items() for key in parts(name, parameter)}
        self.local = {name: weight.detach() for chunk in chunks for name, weight, _ in chunk.table()}
        me = _Holder(groups.rank, groups.tp_rank, groups.dp_rank == groups.cp_rank == 0, frozenset(self.local))
        holders: list[_Holder] = [me] * groups.world_size
        dist.all_gather_object(holders, me)
        # Of a tied embedding, which the last stage has, too, the first stage's: it has the lower rank.
        self.holder = {(name, h.tp_rank): h.rank for h in reversed(holders) if h.first for name in h.names}
        self.blocks = ((name, entry, *rows) for _, name, entry in source.entries() for rows in blocks(entry))

    def rounded(self, source: HFDirectory) -> list[str]:
        """Tensors that the model has in a wider dtype than the layout."""
        own = {name: self.owner[self.tensors[name].runs[0].key] for _, name, _ in source.entries()}
        return [name for _, name, entry in source.entries() if is_wider(self._dtype(own[name]), entry.torch_dtype)]

    def _dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self.table[name].fp32 else self.dtype

    def next_block(self, out: Tensor) -> None:
        """Fill `out` on rank 0 with the next rows of the order."""
        self._gather(*next(self.blocks), out)

    def exhaust(self) -> None:
        """Do this rank's part of all blocks that are left."""
        for name, entry, start, stop in self.blocks:
            self._gather(
                name, entry, start, stop, torch.empty((stop - start, *entry.shape[1:]), dtype=entry.torch_dtype)
            )

    def _gather(self, name: str, entry: Entry, start: int, stop: int, out: Tensor) -> None:
        tensor, tp = self.tensors[name], self.groups.tp_size
        block = out.view(stop - start, *self.table[self.owner[tensor.runs[0].key]].shape[1:])
        for run, row in runs_within(tensor, start, stop):
            owner = self.owner[run.key]
            parameter = self.table[owner]
            for tp_rank in range(1 if parameter.tp_axis is None else tp):
                for held, local_row in held_rows(owner, parameter, tp_rank, tp):
                    if held.key == run.key and (shared := overlap(run, held)):
                        at = row + shared.start - run.start
                        target = block[at : at + shared.rows]
                        if parameter.tp_axis == 1:
                            target = target[:, held_columns(parameter, tp_rank, tp)]
                        self._bring(owner, tp_rank, local_row + shared.start - held.start, target)

    @torch.no_grad()
    def _bring(self, name: str, tp_rank: int, row: int, target: Tensor) -> None:
        """Rows of a rank's parameter, from `row` on, into `target` on rank 0."""
        rank, me = self.holder[name, tp_rank], self.groups.rank
        if rank == me:
            rows = self.local[name][row : row + target.shape[0]]
            if me == 0:
                target.copy_(rows)
            else:
                dist.send(rows.contiguous().flatten().view(torch.uint8), 0)
        elif me == 0:
            rows = torch.empty(target.shape, dtype=self._dtype(name), device=next(iter(self.local.values())).device)
            dist.recv(rows.flatten().view(torch.uint8), rank)
            target.copy_(rows)
