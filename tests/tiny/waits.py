"""What a step asks of the device and of other ranks: `with Waits(batches) as seen: ...; seen.reads, seen.collectives`.

On a CPU every tensor stands for one on a GPU, but for what the loader leaves on the host, and what comes of that.
"""

import traceback
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Waits(TorchDispatchMode):
    """Counts `.item()` and all that calls it (float, bool, a tensor as an index), `.cpu()`, `.tolist()`, `.numpy()`."""

    def __init__(self, batches):
        super().__init__()
        self.reads, self.collectives, self.patches = [], [], ExitStack()
        for batch in batches:
            batch.cu_seqlens.on_host = True

    def __enter__(self):
        for name in ("cpu", "tolist", "numpy"):
            self.patches.enter_context(patch.object(torch.Tensor, name, self._counted(name)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        return super().__exit__(*error)

    def _counted(self, name):
        plain = getattr(torch.Tensor, name)

        def counted(tensor, *args, **kwargs):
            if not on_host(tensor):
                self._note(name)
            result = plain(tensor, *args, **kwargs)
            if isinstance(result, torch.Tensor):
                result = result.clone()  # on a GPU it is another one
                result.on_host = True
            return result

        return counted

    def _note(self, what):
        frames = [f for f in traceback.extract_stack() if "prism" in f.filename or "megatron" in f.filename]
        where = f"{frames[-1].filename.rsplit('/', 1)[-1]}: {frames[-1].line}" if frames else ""
        if 'device.type == "cpu"' not in where:  # what is asked of a CPU only
            self.reads.append(f"{what} in {where}")

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if op is torch.ops.aten._local_scalar_dense.default and not on_host(tensors[0]):
            self._note("item")
        if op.namespace == "c10d":
            self.collectives.append(op.__name__.split(".")[0].rstrip("_"))
        result = op(*args, **(kwargs or {}))
        if tensors and all(map(on_host, tensors)):
            for made in tree_leaves(result):
                if isinstance(made, torch.Tensor):
                    made.on_host = True
        return result


def on_host(tensor):
    return getattr(tensor, "on_host", False)
