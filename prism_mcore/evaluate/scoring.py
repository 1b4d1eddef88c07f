"""Log-probabilities and logits of whole sequences, in any parallel layout, without gradients."""

# b sequences in a micro-batch, s tokens in a sequence, t = b * s tokens and padding, v vocabulary

import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from prism_mcore.batch import PackedBatch
from prism_mcore.model.hybrid import HybridModel
from prism_mcore.parallel import Groups
from prism_mcore.train.step import to_device

# (indices of b sequences, their log-probs [b, s - 1] fp32, their logits [b, s, v] fp32 if asked for), on the CPU
OnScores = Callable[[list[int], Tensor, Tensor | None], None]


@torch.no_grad()
def score(
    chunks: list[HybridModel],
    tokens: Tensor,
    groups: Groups,
    on_scores: OnScores,
    *,
    micro_batch: int,
    logits: bool = False,
    on_batch: Callable[[int], None] = lambda sequences: None,
) -> None:
    """Run sequences [n, s] through the model: log p of each next token, and the logits of every position if asked for.

    Sequences are dealt out over data-parallel ranks by index, `micro_batch` of them to a forward pass. on_scores is
    called on one rank of each replica, the first tensor-parallel one of the last stage; on_batch on every rank, with
    the number of sequences that it starts on.
    """
    mine = list(range(groups.dp_rank, len(tokens), groups.dp_size))
    batches = [mine[i : i + micro_batch] for i in range(0, len(mine), micro_batch)]
    if not batches:
        return
    if groups.vpp > 1:  # interleaving wants a multiple of the stages: empty ones, run on a copy of the first
        batches += [[]] * (-len(batches) % groups.pp_size)
    width = min(micro_batch, len(mine))
    parts = groups.tp_size if chunks[0].config.sequence_parallel else 1
    padding = -width * tokens.shape[1] % parts
    device = next(chunks[0].parameters()).device

    def packed() -> Iterator[tuple[list[int], PackedBatch]]:
        for batch in batches:
            on_batch(len(batch))
            filled = batch + mine[:1] * (width - len(batch))  # the pipeline sends one shape
            yield batch, to_device(one_document_each(tokens[filled], padding), device)

    def forward(data: Iterator[tuple[list[int], PackedBatch]], chunk: HybridModel):
        batch, inputs = next(data)
        return chunk(inputs, logits=logits), partial(report, batch)

    def report(batch: list[int], output: tuple[Tensor, ...], non_loss_data: bool) -> None:
        if groups.tp_rank == 0 and batch:
            _, logprobs, *rest = (_rows(part, len(batch), tokens.shape[1]) for part in output)
            on_scores(batch, logprobs[:, :-1], rest[0] if rest else None)

    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[packed() for _ in chunks] if len(chunks) > 1 else packed(),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=width * tokens.shape[1] + padding,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )


def _rows(values: Tensor, b: int, s: int) -> Tensor:
    """[t, ...] -> [b, s, ...] on the CPU, padding removed; a scalar stays what it is."""
    return values[: b * s].unflatten(0, (b, s)).cpu() if values.dim() else values


def one_document_each(tokens: Tensor, padding: int = 0) -> PackedBatch:
    """Sequences [b, s] as isolated documents of one packed row, then `padding` tokens as a document of their own."""
    b, s = tokens.shape
    lengths = torch.tensor([s] * b + [padding] * (padding > 0))
    flat = torch.cat([tokens.flatten(), tokens.new_zeros(padding)])
    ends = lengths.cumsum(0)
    loss_mask = torch.ones(len(flat), dtype=torch.bool)
    loss_mask[ends - 1] = False
    loss_mask[b * s :] = False
    return PackedBatch(
        tokens=flat[None],
        labels=flat.roll(-1)[None],
        loss_mask=loss_mask[None],
        position_ids=torch.cat([torch.arange(int(n)) for n in lengths])[None],
        seq_idx=torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), lengths)[None],
        cu_seqlens=torch.cat([ends.new_zeros(1), ends]).to(torch.int32),
        max_seqlen=max(s, padding),
        num_tokens=int(loss_mask.sum()),
        source_ids=torch.zeros(1, dtype=torch.int32),
        sample_ids=torch.zeros(1, dtype=torch.int64),
    )


def read_token_lists(path: str | os.PathLike[str], vocab_size: int) -> Tensor:
    """[n, s] int64 from a JSON list of equal-length lists of token ids; a ValueError says which sequence is wrong."""
    try:
        rows = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError(f"{path}: needed: a JSON list of lists of token ids, such as [[5, 6, 7], [9, 3, 4]]")
    if not rows or len(rows[0]) < 2:
        found = f"sequence 0 has {len(rows[0])} tokens" if rows else "there is no sequence"
        raise ValueError(f"{path}: {found}; needed: sequences of at least 2 tokens, to score one after another")
    for index, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(
                f"{path}: sequence {index} has {len(row)} tokens, sequence 0 has {len(rows[0])}; make all one length,"
                " or score each length from a file of its own"
            )
        for position, token in enumerate(row):
            if type(token) is not int or not 0 <= token < vocab_size:
                raise ValueError(
                    f"{path}: token {position} of sequence {index} is {json.dumps(token)};"
                    f" needed: an id from 0 to {vocab_size - 1}, the model's vocabulary"
                )
    return torch.tensor(rows)


class ScoreFile:
    """A safetensors file of fp32 tensors that ranks fill at the same time, row by row, under a temporary name.

    Every rank opens it with the same shapes; one calls `create` before any rank writes and, when all have closed it,
    `publish`. Nothing is held in memory, and a full disk is noticed before the first row.
    """

    def __init__(self, path: str | os.PathLike[str], shapes: dict[str, tuple[int, ...]]):
        self.path, self.part = Path(path), Path(f"{path}.part")
        self.row_bytes = {name: 4 * math.prod(shape[1:]) for name, shape in shapes.items()}
        ends = list(accumulate((4 * math.prod(shape) for shape in shapes.values()), initial=0))
        table = {
            name: {"dtype": "F32", "shape": shape, "data_offsets": offsets}
            for (name, shape), offsets in zip(shapes.items(), pairwise(ends), strict=True)
        }
        text = json.dumps(table).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.starts = {name: len(self.header) + start for name, start in zip(shapes, ends, strict=False)}
        self.size = len(self.header) + ends[-1]
        self.file: int | None = None

    def create(self) -> None:
        """Reserve the space and write the header; an OSError where the space is not there."""
        file = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.posix_fallocate(file, 0, self.size)
            os.pwrite(file, self.header, 0)
        except OSError as error:
            self.part.unlink()
            raise OSError(
                error.errno, f"{os.strerror(error.errno or 0)} ({self.size:,} bytes)", str(self.path)
            ) from error
        finally:
            os.close(file)

    def write(self, name: str, row: int, values: Tensor) -> None:
        """Put `values` [...] into row `row` of a tensor."""
        if self.file is None:
            self.file = os.open(self.part, os.O_RDWR)
        data = memoryview(values.contiguous().numpy()).cast("B")
        assert len(data) == self.row_bytes[name], "a row is what the shape says"
        offset = self.starts[name] + row * len(data)
        while data:
            done = os.pwrite(self.file, data, offset)  # at most 2 GiB at a time
            data, offset = data[done:], offset + done

    def close(self) -> None:
        """Flush what this rank wrote."""
        if self.file is not None:
            os.fsync(self.file)
            os.close(self.file)
            self.file = None

    def publish(self) -> None:
        """Give the complete file its name."""
        os.replace(self.part, self.path)
