"""Our model on a Hugging Face directory, a sub-layer at a time, compared with what transformers makes of it.

Every sub-layer is run twice while its weights are there: fed with what transformers' previous sub-layer gave, so that a
difference is found where it begins, and fed with what ours gave, so that the whole is compared, too.
"""

# b sequences of s tokens; t = b * s tokens and padding (t / tp of them under sequence parallelism), d hidden

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from prism_kernels.boundaries import Boundaries
from prism_mcore.batch import PackedBatch
from prism_mcore.convert.read import HFDirectory, HFTensors
from prism_mcore.convert.reference import EMBEDDING, LOGITS, logits_file, output_names, pieces, stream_file
from prism_mcore.convert.rows import Places, held_columns, held_rows
from prism_mcore.model.context import ModelContext, transformer_config
from prism_mcore.model.hybrid import Block, Embedding, Head, HybridModel
from prism_mcore.model.linear import add_and_norm, norm, residual_sum
from prism_mcore.model.ops import Ops
from prism_mcore.model.parameters import parameters
from prism_mcore.model.state import PackedTokens
from prism_mcore.parallel import Groups

CPU = torch.device("cpu")
Stream = tuple[Tensor, Tensor | None]  # (x, branch), as blocks pass them on


@dataclass(frozen=True)
class Difference:
    """What differs most in one output, relative to transformers' largest number; nan where either side has a nan.

    Difference(output="sub-layer 3 mlp", alone=6.1e-7, chained=9.3e-7)
    """

    output: str
    alone: float  # ours fed with transformers' input
    chained: float  # ours fed with ours from the embedding on


class Sublayers:
    """This rank's part of a model on the CPU in fp32, of which one sub-layer at a time has its weights."""

    def __init__(
        self,
        source: HFDirectory,
        groups: Groups,
        batch: PackedBatch,
        reference: Path,
        *,
        kernels: dict[str, str],
        sequence_parallel: bool,
        on_layer: Callable[[], None] = lambda: None,
    ):
        """batch: the sequences that transformers read, padded for sequence parallelism; reference: what it wrote."""
        self.spec, self.groups, self.batch, self.reference = source.spec(), groups, batch, reference
        self.on_layer = on_layer
        config = transformer_config(self.spec, groups, torch.float32, sequence_parallel, CPU)
        self.context = ModelContext(self.spec, config, groups, Ops(kernels, CPU))
        self.tensors, self.hf = HFTensors(source), source.tensors(self.spec)
        self.places, self.table = Places(self.hf), parameters(self.spec, groups.tp_size)
        boundaries = Boundaries.on(CPU, batch.cu_seqlens)
        self.empty = HybridModel(self.context, [])  # what it says of names and positions needs no weights
        self.seq = PackedTokens(boundaries, batch.max_seqlen, self.empty.rope(batch.position_ids.flatten()))

    @torch.no_grad()
    def compare(self, layers: list[int]) -> list[Difference]:
        """What the first tensor-parallel rank finds of these sub-layers, and of what comes before or after them."""
        names, found = output_names(self.spec), []
        multiplier = self.spec.residual_multiplier

        def note(name: str, alone: float, chained: float) -> None:
            if self.groups.tp_rank == 0:
                found.append(Difference(name, alone, chained))

        with self.tensors:
            if layers[0] == 0:
                stream: Stream = (self._embedded(), None)
                difference = self._difference(stream[0], 0)
                note(EMBEDDING, difference, difference)
            else:
                stream = (self._received(), None)
            for index in layers:
                block = Block(self.context, self.spec.pattern[index], recompute=False)
                self._fill(f"layers.{index}.", block)
                alone = block.total(*block(self._given(index), self.seq))
                stream = block(stream[0], self.seq, stream[1])
                note(names[index + 1], *(self._difference(x, index + 1) for x in (alone, block.total(*stream))))
                del block
                self.on_layer()
            if layers[-1] < len(self.spec.pattern) - 1:
                self._send(residual_sum(*stream, multiplier))
                return found
            final = norm(self.context, self.spec.hidden_size)
            self._fill("final_norm.", final)
            alone, _ = add_and_norm(final, self._given(len(self.spec.pattern)), None, multiplier)
            chained, _ = add_and_norm(final, *stream, multiplier)
            note(LOGITS, *self._logit_differences(alone, chained))
        return found

    def _fill(self, prefix: str, module: nn.Module) -> None:
        """This rank's slices of every parameter of a module whose names begin with `prefix`."""
        rank, tp = self.groups.tp_rank, self.groups.tp_size
        for name, weight in module.named_parameters():
            name = self.empty.global_name(prefix + name)
            parameter, filled = self.table[name], 0
            for run, row in held_rows(name, parameter, rank, tp):
                for copy in self.places.find(run, row):
                    rows = self._rows(copy.name, copy.hf_row, copy.hf_row + copy.rows)
                    target = weight[copy.row : copy.row + copy.rows]
                    columns = rows if parameter.tp_axis != 1 else rows[:, held_columns(parameter, rank, tp)]
                    target.copy_(columns.reshape(target.shape))
                    filled += copy.rows
            assert filled == weight.shape[0], f"{filled} rows of {name} were found, not {weight.shape[0]}"

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        entry = self.tensors.places[name][1]
        rows = torch.empty((stop - start, *entry.shape[1:]), dtype=entry.torch_dtype)
        self.tensors.read(name, start, rows)
        return rows

    def _of_vocabulary(self, size: int) -> ModelContext:
        return replace(self.context, spec=replace(self.spec, vocab_size=size))

    def _embedded(self) -> Tensor:
        """The embedding of the tokens, of which it holds the rows of no other."""
        assert self.batch.tokens is not None
        wanted, places = self.batch.tokens.flatten().unique(return_inverse=True)
        embedding = Embedding(self._of_vocabulary(len(wanted)))
        rows = torch.cat([self._rows(self._file("embedding.weight"), i, i + 1) for i in wanted.tolist()])
        self._share(rows, embedding.weight)
        return embedding(places)

    def _logit_differences(self, *hidden: Tensor) -> list[float]:
        """Of the logits of each of some final hidden states, over the whole vocabulary."""
        largest, most = [0.0] * len(hidden), 0.0
        name = self._file("output.weight" if "output.weight" in self.table else "embedding.weight")
        for start, stop in pieces(self.spec):
            self.tensors.check_tied(self.hf, start, stop)
            head = Head(self._of_vocabulary(stop - start), None)
            self._share(self._rows(name, start, stop), head.weight)
            theirs = load_file(logits_file(self.reference, start))["x"].flatten(0, 1)
            most = _larger(most, theirs)
            for i, x in enumerate(hidden):
                largest[i] = _larger(largest[i], head.logits(x, None)[: len(theirs)] - theirs)
        return [one / most for one in largest]

    def _share(self, rows: Tensor, weight: Tensor) -> None:
        """This rank's part of some rows of the vocabulary; what pads them is zero."""
        mine = rows[self.groups.tp_rank * len(weight) :][: len(weight)]
        weight[: len(mine)].copy_(mine)
        weight[len(mine) :].zero_()

    def _file(self, name: str) -> str:
        return next(file for file, tensor in self.hf.items() if tensor.runs[0].key == name and not tensor.optional)

    def _theirs(self, index: int) -> Tensor:
        return load_file(stream_file(self.reference, index))["x"].flatten(0, 1)  # [b * s, d]

    def _given(self, index: int) -> Tensor:
        """transformers' stream before sub-layer `index` as ours would come: [t, 1, d], or this rank's part."""
        theirs = self._theirs(index)
        padded = torch.cat([theirs, theirs.new_zeros(self.batch.position_ids.numel() - len(theirs), theirs.shape[1])])
        mine = (
            padded.chunk(self.groups.tp_size)[self.groups.tp_rank] if self.context.config.sequence_parallel else padded
        )
        return mine.unsqueeze(1)

    def _difference(self, ours: Tensor, index: int) -> float:
        parts = [ours]
        if self.context.config.sequence_parallel:
            parts = [torch.empty_like(ours) for _ in range(self.groups.tp_size)]
            dist.all_gather(parts, ours.contiguous(), group=self.groups.tp)
        theirs = self._theirs(index)
        return _larger(0.0, torch.cat(parts).squeeze(1)[: len(theirs)] - theirs) / _larger(0.0, theirs)

    def _send(self, x: Tensor) -> None:
        pp = self.groups.pp
        dist.send(x.contiguous(), dist.get_global_rank(pp, self.groups.pp_rank + 1), group=pp)

    def _received(self) -> Tensor:
        pp, shape = self.groups.pp, self._given(0).shape
        x = torch.empty(shape)
        dist.recv(x, dist.get_global_rank(pp, self.groups.pp_rank - 1), group=pp)
        return x


def _larger(than: float, x: Tensor) -> float:
    """The largest |x| where it is more than `than`, nan where any is."""
    most = float(x.abs().max())
    return most if most != most or most > than else than
