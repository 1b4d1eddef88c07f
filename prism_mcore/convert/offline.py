"""Checkpoints on disk to Hugging Face directories and back: one process on a CPU, no process group, bounded memory."""

import contextlib
import functools
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from prism_mcore.checkpoint.durable import damage, write_atomically
from prism_mcore.checkpoint.files import Buffers, read_ahead
from prism_mcore.checkpoint.folder import LATEST, CheckpointError, checkpoint_in, read_state, step_name
from prism_mcore.checkpoint.places import Piece
from prism_mcore.checkpoint.stored import MASTER, StoredTensors, write_weights
from prism_mcore.convert.names import ExchangeError, HFTensor, RowRange, hf_tensors, keys, parts
from prism_mcore.convert.read import (
    LAYOUT,
    HFDirectory,
    HFTensors,
    keep_directory,
    kept_directory,
    read_directory,
    side_files,
)
from prism_mcore.convert.rows import Places, runs_within
from prism_mcore.convert.write import conventional_directory, in_fp32, is_wider, new_directory, write_directory
from prism_mcore.model.parameters import parameters
from prism_mcore.model.settings import SOURCE, config_beside
from prism_mcore.model.spec import ModelSpec, find_config, read_spec
from prism_mcore.model.split import split_layers

PIECE_BYTES = 64 * 2**20  # of fp32: tensors are stored in pieces of about so many
FILE_BYTES = 2 * 10**9  # of fp32: ranks and threads share the verifying file by file

OnBytes = Callable[[int], None]


# --- to Hugging Face --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Export:
    """What an export will write, and from what."""

    checkpoint: Path
    spec: ModelSpec
    source: HFDirectory  # the layout to write
    master: bool
    rounded: tuple[str, ...] = ()  # tensors that the checkpoint has in a wider dtype than the layout

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.end - entry.start for _, _, entry in self.source.entries())


def plan_export(
    path: Path, *, master: bool = False, config: Path | None = None, tokenizer: Path | None = None
) -> Export:
    """Look at a checkpoint, or the newest of a run or an import, verify it, and decide what its export will be.

    master: the optimizer's fp32 weights, every tensor in fp32. config: the config.json of a model whose run has kept
    none. tokenizer: a folder whose files are copied, too. Raises ExchangeError.
    """
    with _as_exchange_error():
        checkpoint = checkpoint_in(path)
        step = read_state(checkpoint)["step"]
    if problems := _damage(checkpoint):
        raise ExchangeError(f"cannot export {checkpoint}: {'; '.join(problems)}")
    folder = config or source_of(checkpoint)
    with _as_exchange_error(), StoredTensors(checkpoint, MASTER if master else "") as stored:
        if (folder / LAYOUT).is_file():
            source = kept_directory(folder)
            spec = source.spec()
        else:
            file = folder if folder.is_file() else folder / "config.json"
            spec = read_spec(file)
            dtypes = {name: stored.dtype(tensor.runs[0].key) for name, tensor in hf_tensors(spec).items()}
            source = conventional_directory(spec, folder, (file,), dtypes)
        _check_shapes(stored, spec)
        source = in_fp32(source) if master else source
        # An import holds what the directory held; where it mixed dtypes within a key, in the widest of them.
        rounded = _rounded(stored, source, spec) if step else ()
    extra = tuple(path for path in side_files(tokenizer) if path.name != "config.json") if tokenizer else ()
    source = replace(source, side_files=tuple({p.name: p for p in (*source.side_files, *extra)}.values()))
    return Export(checkpoint, spec, source, master, rounded)


def _rounded(stored: StoredTensors, source: HFDirectory, spec: ModelSpec) -> tuple[str, ...]:
    keys_of = {name: {run.key for run in tensor.runs} for name, tensor in source.tensors(spec).items()}
    return tuple(
        name
        for _, name, entry in source.entries()
        if any(is_wider(stored.dtype(key), entry.torch_dtype) for key in keys_of[name])
    )


def export_checkpoint(export: Export, out: Path, on_bytes: OnBytes = lambda size: None) -> None:
    """Write what was planned to a directory that is not there; memory stays at a few blocks of 8 MiB."""
    tensors = export.source.tensors(export.spec)
    with _as_exchange_error(), StoredTensors(export.checkpoint, MASTER if export.master else "") as stored:
        write_directory(
            out, export.source, lambda name, start, rows: read_rows(stored, tensors[name], start, rows), on_bytes
        )


@contextlib.contextmanager
def _as_exchange_error() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise ExchangeError(str(error)) from error


def source_of(checkpoint: Path) -> Path:
    """The folder that says where a checkpoint's model came from: that of its run or of its import."""
    if (folder := config_beside(checkpoint)) is not None:
        return folder
    raise ExchangeError(f"there is no {SOURCE}/config.json beside {checkpoint} or its run; give --config config.json")


def remember_source(init: str, spec: str | None, folder: Path) -> None:
    """Keep beside a new run what exports of it need: one rank calls it when the weights are set.

    init: `model.init`, of which a Hugging Face directory's layout and side files, or the kept ones of a checkpoint's
    run, are copied. spec: `model.spec`, whose config.json alone is kept for random weights.
    """
    if init != "random" and (Path(init) / "config.json").is_file():
        keep_directory(read_directory(Path(init)), folder)
        return
    if init != "random":
        with contextlib.suppress(ExchangeError, CheckpointError):  # a run from before sources were kept
            shutil.copytree(source_of(checkpoint_in(Path(init))), folder, dirs_exist_ok=True)
            return
    if spec is not None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(find_config(spec), folder / "config.json")


def read_rows(stored: StoredTensors, tensor: HFTensor, start: int, out: Tensor) -> None:
    """Fill `out` with the rows of a Hugging Face tensor from `start` on, from the keys of a checkpoint."""
    out = out.view(out.shape[0], *stored.shape(tensor.runs[0].key)[1:])  # conv1d.weight has an axis of 1 more than ours
    for run, row in runs_within(tensor, start, start + out.shape[0]):
        target = out[row : row + run.rows]
        if stored.dtype(run.key) == out.dtype:
            stored.read(run.key, run.start, target)
        else:
            read = torch.empty(target.shape, dtype=stored.dtype(run.key))
            stored.read(run.key, run.start, read)
            target.copy_(read)


def _damage(checkpoint: Path) -> list[str]:
    """What is wrong with the files, hashed in several threads: hashing is slower than reading."""
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda part: damage(checkpoint, part, threads), range(threads))
        return sorted({problem for problems in found for problem in problems})


def _check_shapes(stored: StoredTensors, spec: ModelSpec) -> None:
    table = parameters(spec)
    for key, shape in keys(spec).items():
        found = stored.shape(key)
        padded = key in table and table[key].vocabulary and found[0] >= shape[0]
        if found[1:] != shape[1:] or (found[0] != shape[0] and not padded):
            raise ExchangeError(
                f"{stored.path}: {stored.prefix}{key} has the shape {list(found)}; the config.json needs {list(shape)}"
            )


# --- from Hugging Face ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """What an import will read."""

    source: HFDirectory
    spec: ModelSpec
    tensors: dict[str, HFTensor]

    @property
    def size(self) -> int:
        """Bytes of the tensors to write; a tied duplicate is not."""
        return sum(e.end - e.start for _, name, e in self.source.entries() if not self.tensors[name].optional)


def plan_import(path: Path) -> Import:
    """Look at a Hugging Face directory and check it; raises ExchangeError."""
    source = read_directory(path)
    spec = source.spec()
    return Import(source, spec, source.tensors(spec))


def import_hf(plan: Import, out: Path, *, tp: int = 1, pp: int = 1, on_bytes: OnBytes = lambda size: None) -> None:
    """Write a checkpoint of weights alone, in the dtypes of the directory, and where they came from.

        <out>/step_00000000/    the checkpoint; model.init=<out> starts a run from it
        <out>/source/           the directory's layout and side files, for exports
        <out>/latest

    tp, pp: write the files that so many ranks would; every layout can read them, but in this one a rank opens
    hardly more than its own, and they are verified in parallel. Memory stays at a few pieces of at most 64 MiB.
    """
    pieces = sorted(_pieces(plan, tp, pp), key=lambda each: each[1])
    buffers, places = Buffers(3), Places(plan.tensors)  # one is read, one is waiting, one is written
    with new_directory(out) as folder, HFTensors(plan.source) as reader:
        reader.check_tied(plan.tensors, 0, plan.spec.vocab_size)
        path = folder / step_name(0)
        keep_directory(plan.source, folder / SOURCE)
        write_atomically(folder / LATEST, path.name)
        reads = (functools.partial(_read_piece, piece, reader, places, buffers) for piece, _ in pieces)
        with contextlib.closing(read_ahead(reads)) as tensors:
            described = [(piece, _dtype_of(piece, reader, places), file) for piece, file in pieces]
            write_weights(path, described, tensors, {"tp": tp, "pp": pp, "vpp": 1, "dp": 1, "cp": 1}, on_bytes)


def _pieces(plan: Import, tp: int, pp: int) -> Iterator[tuple[Piece, str]]:
    """What `tp` x `pp` ranks would hold of every key, in runs of rows of PIECE_BYTES; a rank without rows has none."""
    stage_of = _stages(plan.spec, pp)
    written: Counter[int] = Counter()  # bytes of fp32 by rank
    for name, parameter in parameters(plan.spec).items():
        for key, shape in parts(name, parameter).items():
            axis = parameter.tp_axis
            each = shape[0] if axis is None else -(-shape[axis] // tp)
            for rank, start in enumerate(range(0, shape[axis or 0], each)):
                begin = [start if i == axis else 0 for i in range(len(shape))]
                end = [min(size, start + each) if i == axis else size for i, size in enumerate(shape)]
                rows = max(1, PIECE_BYTES // (4 * math.prod(e - b for b, e in zip(begin[1:], end[1:], strict=True))))
                for row in range(begin[0], end[0], rows):
                    sizes = (min(rows, end[0] - row), *(e - b for b, e in zip(begin[1:], end[1:], strict=True)))
                    writer = stage_of(name) * tp + rank
                    file = f"__{writer}_{written[writer] // FILE_BYTES}.safetensors"
                    written[writer] += 4 * math.prod(sizes)
                    yield Piece.of_box(key, shape, (row, *begin[1:]), sizes), file


def _read_piece(piece: Piece, reader: HFTensors, places: Places, buffers: Buffers) -> Tensor:
    wanted = RowRange(piece.key, piece.offsets[0], piece.sizes[0])
    dtype = _dtype_of(piece, reader, places)
    out = buffers.take(piece.sizes, dtype)
    for copy in places.find(wanted):
        own = reader.places[copy.name][1].torch_dtype
        target = out[copy.row : copy.row + copy.rows]
        if own == dtype and piece.sizes[1:] == piece.shape[1:]:
            reader.read(copy.name, copy.hf_row, target)
        else:  # some of the columns, or another dtype
            read = torch.empty((copy.rows, *piece.shape[1:]), dtype=own)
            reader.read(copy.name, copy.hf_row, read)
            for axis, (start, size) in enumerate(zip(piece.offsets[1:], piece.sizes[1:], strict=True), start=1):
                read = read.narrow(axis, start, size)
            target.copy_(read)
    return out


def _dtype_of(piece: Piece, reader: HFTensors, places: Places) -> torch.dtype:
    """The narrowest dtype that holds a key exactly: a directory may mix them, and q be bf16 where k is fp32."""
    found = places.find(RowRange(piece.key, 0, piece.shape[0]))
    return functools.reduce(torch.promote_types, {reader.places[copy.name][1].torch_dtype for copy in found})


def _stages(spec: ModelSpec, pp: int) -> Callable[[str], int]:
    """The pipeline stage of a parameter by name."""
    split = split_layers(spec, pp, 1, spec.max_positions)
    of_layer = {layer: stage for stage, layers in enumerate(split) for layer in layers}

    def stage(name: str) -> int:
        if name.startswith("layers."):
            return of_layer[int(name.split(".")[1])]
        return 0 if name == "embedding.weight" else pp - 1

    return stage
