"""Checkpoints on disk to Hugging Face directories and back: one process on a CPU, no process group, bounded memory."""

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from prism_mcore.convert.export import conventional_source, in_fp32, write_directory
from prism_mcore.convert.files import HashedFile, HashThreads, new_directory
from prism_mcore.convert.layout import Places, runs_within
from prism_mcore.convert.names import ExchangeError, HFTensor, Run, Shape, hf_tensors, keys, parts
from prism_mcore.convert.source import (
    LAYOUT,
    Source,
    SourceTensors,
    keep_source,
    kept_source,
    read_source,
    side_files,
)
from prism_mcore.convert.stored import StoredTensors
from prism_mcore.model.parameters import Parameter, parameters
from prism_mcore.model.spec import ModelSpec, _find_config, read_spec
from prism_mcore.plan.split import split_layers
from prism_mcore.train.checkpoint import FORMAT_VERSION, LATEST, STATE, CheckpointError, latest, read_state, step_name
from prism_mcore.train.manifest import FileRecord, damage, write_atomically, write_manifest

SOURCE = "source"  # beside the checkpoints of a run or an import: where its weights came from
MASTER = "optimizer.state.param."  # the optimizer's fp32 copy of a key

OnBytes = Callable[[int], None]


# --- to Hugging Face --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Export:
    """What an export will write, and from what."""

    checkpoint: Path
    spec: ModelSpec
    source: Source  # the layout to write
    master: bool

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
    checkpoint = checkpoint_in(path)
    try:
        read_state(checkpoint)
    except CheckpointError as error:
        raise ExchangeError(str(error)) from error
    if problems := damage(checkpoint):
        raise ExchangeError(f"cannot export {checkpoint}: {'; '.join(problems)}")
    folder = config or source_of(checkpoint)
    with StoredTensors(checkpoint, MASTER if master else "") as stored:
        if (folder / LAYOUT).is_file():
            source = kept_source(folder)
            spec = source.spec()
        else:
            file = folder if folder.is_file() else folder / "config.json"
            spec = read_spec(file)
            dtypes = {name: stored.dtype(tensor.runs[0].key) for name, tensor in hf_tensors(spec).items()}
            source = conventional_source(spec, folder, (file,), dtypes)
        _check_shapes(stored, spec)
    extra = tuple(path for path in side_files(tokenizer) if path.name != "config.json") if tokenizer else ()
    source = replace(source, side_files=tuple({p.name: p for p in (*source.side_files, *extra)}.values()))
    return Export(checkpoint, spec, in_fp32(source) if master else source, master)


def export_checkpoint(export: Export, out: Path, on_bytes: OnBytes = lambda size: None) -> None:
    """Write what was planned to a directory that is not there; memory stays at a few blocks of 32 MiB."""
    tensors = export.source.tensors(export.spec)
    dtypes = {name: entry.torch_dtype for _, name, entry in export.source.entries()}
    with StoredTensors(export.checkpoint, MASTER if export.master else "") as stored:
        write_directory(
            out, export.source, lambda name, *rows: _read_rows(stored, tensors[name], dtypes[name], *rows), on_bytes
        )


def checkpoint_in(path: Path) -> Path:
    """A checkpoint's folder, given that, a run's, or an import's: then the newest."""
    for folder in (path, path / "checkpoints"):
        if (found := folder if (folder / STATE).is_file() else latest(folder)) is not None:
            return found
    raise ExchangeError(f"{path} holds no checkpoint; give a checkpoint's folder, a run's, or what from-hf wrote")


def source_of(checkpoint: Path) -> Path:
    """The folder that says where a checkpoint's model came from: that of its run or of its import."""
    checkpoint = checkpoint.absolute()
    for folder in (checkpoint.parent / SOURCE, checkpoint.parent.parent / SOURCE):
        if (folder / "config.json").is_file():
            return folder
    raise ExchangeError(f"there is no {SOURCE}/config.json beside {checkpoint} or its run; give --config config.json")


def remember_source(init: str, spec: str | None, folder: Path) -> None:
    """Keep beside a new run what exports of it need: one rank calls it when the weights are set.

    init: `model.init`, of which a Hugging Face directory's layout and side files, or the kept ones of a checkpoint's
    run, are copied. spec: `model.spec`, whose config.json alone is kept for random weights.
    """
    if init != "random" and (Path(init) / "config.json").is_file():
        keep_source(read_source(Path(init)), folder)
        return
    if init != "random":
        with contextlib.suppress(ExchangeError):  # a run from before sources were kept
            shutil.copytree(source_of(checkpoint_in(Path(init))), folder, dirs_exist_ok=True)
            return
    if spec is not None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_find_config(spec), folder / "config.json")


def _read_rows(stored: StoredTensors, tensor: HFTensor, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    tail = stored.shape(tensor.runs[0].key)[1:]  # conv1d.weight has one axis less than in the directory
    block = torch.empty((stop - start, *tail), dtype=dtype)
    for run, row in runs_within(tensor, start, stop):
        target = block[row : row + run.rows]
        if stored.dtype(run.key) == dtype:
            stored.read(run, target)
        else:
            read = torch.empty(target.shape, dtype=stored.dtype(run.key))
            stored.read(run, read)
            target.copy_(read)
    return block


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

    source: Source
    spec: ModelSpec
    tensors: dict[str, HFTensor]

    @property
    def size(self) -> int:
        """Bytes of the tensors to write; a tied duplicate is not."""
        return sum(e.end - e.start for _, name, e in self.source.entries() if not self.tensors[name].optional)


def plan_import(path: Path) -> Import:
    """Look at a Hugging Face directory and check it; raises ExchangeError."""
    source = read_source(path)
    spec = source.spec()
    return Import(source, spec, source.tensors(spec))


def import_hf(plan: Import, out: Path, *, tp: int = 1, pp: int = 1, on_bytes: OnBytes = lambda size: None) -> None:
    """Write a checkpoint of weights alone, in the dtypes of the directory, and where they came from.

        <out>/step_00000000/    the checkpoint; model.init=<out> starts a run from it
        <out>/source/           the directory's layout and side files, for exports
        <out>/latest

    tp, pp: write the files that so many ranks would; every layout can read them, but in this one a rank opens
    hardly more than its own, and they are verified in parallel. Memory stays at the largest tensor, twice.
    """
    with new_directory(out) as folder, SourceTensors(plan.source) as reader:
        reader.check_tied(plan.tensors, 0, plan.spec.vocab_size)
        path = folder / step_name(0)
        path.mkdir()
        keep_source(plan.source, folder / SOURCE)
        write_atomically(folder / LATEST, path.name)
        index = Metadata({}, storage_data={})
        with HashThreads() as threads:
            records = _write_tensors(path, plan, reader, index, tp, pp, threads, on_bytes)
        (path / ".metadata").write_bytes(pickle.dumps(index))
        save_config(CheckpointingConfig("torch_dist", 1), str(path))
        torch.save({}, path / "common.pt")
        layout = {"tp": tp, "pp": pp, "vpp": 1, "dp": 1, "cp": 1}
        state = {"format_version": FORMAT_VERSION, "step": 0, "layout": layout, "optimizer_step": 0, "state": {}}
        (path / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        write_manifest(path, records)


def _write_tensors(
    path: Path,
    plan: Import,
    reader: SourceTensors,
    index: Metadata,
    tp: int,
    pp: int,
    threads: HashThreads,
    on_bytes: OnBytes,
) -> dict[str, FileRecord]:
    stages = _stages(plan.spec, pp)
    places = Places(plan.tensors)
    files: dict[str, HashedFile] = {}
    with contextlib.ExitStack() as opened:
        for name, parameter in parameters(plan.spec).items():
            for key, shape in parts(name, parameter).items():
                whole = _read_key(key, shape, places, reader)
                chunks = []
                for rank, offsets, piece in _pieces(whole, parameter, tp):
                    file = f"__{stages(name) * tp + rank}_0.distcp"
                    if file not in files:
                        files[file] = opened.enter_context(contextlib.closing(HashedFile(path / file, threads)))
                    start = files[file].size
                    _save(piece, files[file])
                    chunks.append(ChunkStorageMetadata(torch.Size(offsets), piece.shape))
                    info = _StorageInfo(file, start, files[file].size - start)
                    index.storage_data[MetadataIndex(key, offsets)] = info
                    on_bytes(piece.nbytes)
                properties = TensorProperties(dtype=whole.dtype)
                index.state_dict_metadata[key] = TensorStorageMetadata(properties, whole.shape, chunks)
    return {name: file.record for name, file in files.items()}


def _read_key(key: str, shape: Shape, places: Places, reader: SourceTensors) -> Tensor:
    copies = list(places.find(Run(key, 0, shape[0])))
    dtypes = [reader.places[copy.name][1].torch_dtype for copy in copies]
    dtype = dtypes[0]
    for other in dtypes:  # a directory that mixes them: the narrowest dtype that holds all
        dtype = torch.promote_types(dtype, other)
    whole = torch.empty(shape, dtype=dtype)
    for copy, own in zip(copies, dtypes, strict=True):
        target = whole[copy.row : copy.row + copy.rows]
        read = target if own == dtype else torch.empty(target.shape, dtype=own)
        reader.read(copy.name, copy.hf_row, read)
        if read is not target:
            target.copy_(read)
    return whole


def _pieces(whole: Tensor, parameter: Parameter, tp: int) -> Iterator[tuple[int, Shape, Tensor]]:
    """(rank, offsets, contiguous piece) of a key as `tp` ranks would write it; a rank without rows writes none."""
    if parameter.tp_axis is None:
        yield 0, (0,) * whole.dim(), whole
        return
    start = 0
    for rank, piece in enumerate(whole.split(-(-whole.shape[parameter.tp_axis] // tp), dim=parameter.tp_axis)):
        offsets = tuple(start if axis == parameter.tp_axis else 0 for axis in range(whole.dim()))
        yield rank, offsets, piece.clone() if tp > 1 else piece  # torch.save writes all of what this is a view of
        start += piece.shape[parameter.tp_axis]


def _save(tensor: Tensor, file: HashedFile) -> None:
    try:
        torch.save(tensor.contiguous(), file)
    except RuntimeError as error:  # torch makes of a full disk an assertion about positions
        raise file.error or error from error


def _stages(spec: ModelSpec, pp: int) -> Callable[[str], int]:
    """The pipeline stage of a parameter by name."""
    split = split_layers(spec, pp, 1, spec.max_positions)
    of_layer = {layer: stage for stage, layers in enumerate(split) for layer in layers}

    def stage(name: str) -> int:
        if name.startswith("layers."):
            return of_layer[int(name.split(".")[1])]
        return 0 if name == "embedding.weight" else pp - 1

    return stage
