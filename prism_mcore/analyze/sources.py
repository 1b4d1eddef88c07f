"""The weights of a model wherever they lie, tensor by tensor in Hugging Face's names: a directory, or a checkpoint."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from prism_mcore.checkpoint.stored import MASTER, StoredTensors
from prism_mcore.convert.names import ExchangeError
from prism_mcore.convert.offline import Export, plan_export, read_rows
from prism_mcore.convert.read import HFDirectory, HFTensors, check_same_model, read_directory

Shape = tuple[int, ...]


class Weights(ExitStack):
    """Rows of a model's tensors; close it. Raises ExchangeError, naming the file, for what cannot be read.

    master: of a checkpoint, the optimizer's fp32 weights.
    """

    def __init__(self, path: Path, *, master: bool = False):
        super().__init__()
        self.path = path
        is_hf = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
        self.export: Export | None = None if is_hf else plan_export(path, master=master)
        self.layout: HFDirectory = read_directory(path) if self.export is None else self.export.source
        self.spec = self.layout.spec()
        tensors = self.layout.tensors(self.spec)
        self.keys = {name: tensor.runs[0].key for name, tensor in tensors.items()}  # the first of those it is made of
        self.entries = {name: entry for _, name, entry in self.layout.entries()}
        if self.export is None:
            self._read = self.enter_context(HFTensors(self.layout)).read
        else:
            stored = self.enter_context(StoredTensors(self.export.checkpoint, MASTER if master else ""))
            self._read = lambda name, row, out: read_rows(stored, tensors[name], row, out)

    @property
    def bytes(self) -> int:
        return sum(entry.end - entry.start for entry in self.entries.values())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start, ...] of a tensor, in its own dtype."""
        entry = self.entries[name]
        out = torch.empty((stop - start, *entry.shape[1:]), dtype=entry.torch_dtype)
        self._read(name, start, out)
        return out


def require_same(models: Sequence[Weights]) -> None:
    """Raise ExchangeError, naming the first difference, unless all have the same architecture and tensors."""
    if not models[0].entries:
        raise ExchangeError(f"{models[0].path} has no tensors")
    for model in models[1:]:
        check_same_model(model.layout, models[0].layout)
