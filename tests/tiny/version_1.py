"""A checkpoint as version 1 wrote it: torch's format, whose index is a pickle. For tests that it is still read."""

import json
import math
import pickle

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from prism_mcore.checkpoint.durable import write_manifest
from prism_mcore.checkpoint.stored import StoredTensors

FILE = "__0_0.distcp"


def make_version_1(step):
    """Rewrite the checkpoint in a folder; a tensor of several rows is kept in two pieces."""
    index = Metadata({}, storage_data={})
    with StoredTensors(step) as stored, open(step / FILE, "wb") as file:
        for key in stored.index:
            shape, dtype = stored.shape(key), stored.dtype(key)
            entry = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
            index.state_dict_metadata[key] = entry
            for row in {0, math.ceil(shape[0] / 2)} - {shape[0]}:
                rows = math.ceil(shape[0] / 2) if row == 0 else shape[0] - row
                piece = torch.empty((rows, *shape[1:]), dtype=dtype)
                stored.read(key, row, piece)
                start = file.tell()
                torch.save(piece, file)
                offsets = torch.Size((row, *(0 for _ in shape[1:])))
                entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size(piece.shape)))
                index.storage_data[MetadataIndex(key, offsets)] = _StorageInfo(FILE, start, file.tell() - start)
    for written in [*step.glob("*.safetensors"), step / "tensors.json"]:
        written.unlink()
    (step / ".metadata").write_bytes(pickle.dumps(index))
    (step / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    torch.save({}, step / "common.pt")
    state = json.loads((step / "state.json").read_text())
    (step / "state.json").write_text(json.dumps({**state, "format_version": 1}))
    write_manifest(step, {})
