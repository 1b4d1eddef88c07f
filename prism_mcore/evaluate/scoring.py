"""Log-probabilities and logits of whole sequences, in any parallel layout, without gradients."""

# b sequences in a micro-batch, s tokens in a sequence, t = b * s tokens and padding, v vocabulary

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from prism_mcore import platform
from prism_mcore.batch import PackedBatch
from prism_mcore.console import progress_bar, say
from prism_mcore.convert.online import model_from_hf
from prism_mcore.evaluate.files import ScoreFile, shapes_of
from prism_mcore.evaluate.settings import ScoreSettings
from prism_mcore.meeting import Meeting
from prism_mcore.model.hybrid import HybridModel
from prism_mcore.parallel import Groups, init_groups
from prism_mcore.train.pipeline import run_pipeline
from prism_mcore.train.step import to_device

# (indices of b sequences, their log-probs [b, s - 1] fp32, their logits [b, s, v] fp32 if asked for), on the CPU
OnScores = Callable[[list[int], Tensor, Tensor | None], None]


def score_file(
    hf: Path, out: Path, settings: ScoreSettings, sequences: list[list[int]], *, micro_batch: int, logits: bool
) -> None:
    """Score sequences of one length with the model in `hf` and write `out`; every rank calls it.

    Raises ExchangeError for a model that cannot be read, OSError for a file that cannot be written, LostRank where
    another rank is gone.
    """
    tokens = torch.tensor(sequences)
    device = platform.start(timeout=settings.parallel.timeout)
    groups = init_groups(settings.parallel)
    meeting = Meeting.of_all_ranks(settings.parallel.timeout)
    chunks = model_from_hf(hf, settings, groups, device, seq_len=tokens.shape[1])
    file = ScoreFile(out, shapes_of(len(tokens), tokens.shape[1], chunks[0].spec.vocab_size, logits))
    if groups.rank == 0:
        file.create()
    dist.barrier()

    def write(sequences: list[int], logprobs: Tensor, scores: Tensor | None) -> None:
        for place, sequence in enumerate(sequences):
            file.write("logprobs", sequence, logprobs[place])
            if scores is not None:
                file.write("logits", sequence, scores[place])

    started = time.monotonic()
    total = -(-len(tokens) // groups.dp_size) * settings.parallel.vpp  # every virtual stage sees each sequence
    with progress_bar("scoring", total, shown=groups.rank == 0) as advance:

        def done(sequences: int) -> None:
            meeting.working()
            advance(sequences)

        score(chunks, tokens, groups, write, micro_batch=micro_batch, logits=logits, on_batch=done)
    file.close()
    meeting.join()  # nodes may be unequally fast
    if groups.rank == 0:
        file.publish()
        seconds = time.monotonic() - started
        say(
            f"{out}: {len(tokens):,} sequences of {tokens.shape[1]:,} tokens"
            f" in {seconds:.1f} s ({tokens.numel() / seconds:,.0f} tokens/s)"
        )
    platform.shutdown()


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

    run_pipeline(
        forward,
        chunks,
        packed,
        num_micro_batches=len(batches),
        num_tokens=width * tokens.shape[1] + padding,
        forward_only=True,
        collect=True,
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
