"""Log-probabilities of continuations given contexts: packed, contexts once, logits only where asked for."""

# t packed tokens, n labels (continuations' tokens) of a pass, v vocabulary (local)

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from prism_mcore.batch import PackedBatch
from prism_mcore.model.hybrid import HybridModel
from prism_mcore.train.step import to_device

Pair = tuple[Sequence[int], Sequence[int]]  # tokens of a context and of its continuation, at least one each
LOGITS = 1 << 26  # alive at a time


@dataclass(frozen=True)
class Score:
    """`Score(-3.2, False)`: the sum over a continuation's tokens of log p, and whether each was the likeliest."""

    logprob: float
    greedy: bool


@dataclass(frozen=True)
class _Shared:
    """Pairs of one context: it is run once, without its last token, and each continuation behind it."""

    context: Sequence[int]
    pairs: list[int]  # their places


@torch.inference_mode()
def score_continuations(
    model: HybridModel,
    pairs: Sequence[Pair],
    *,
    pass_tokens: int = 8192,
    before_pass: Callable[[int], object] = lambda pairs: None,
) -> list[Score]:
    """A score for each pair. The model is whole on this rank or its tensor-parallel group, which all call it alike.

    pass_tokens: in one forward pass; one context with its continuations that takes more has a pass of its own.
    before_pass: told how many pairs the next pass has.
    """
    scores: dict[int, Score] = {}
    with model.whole_sequences():
        for groups in _passes(pairs, pass_tokens):
            before_pass(sum(len(group.pairs) for group in groups))
            scores |= _score_pass(model, pairs, groups)
    return [scores[place] for place in range(len(pairs))]


def _passes(pairs: Sequence[Pair], pass_tokens: int) -> Iterator[list[_Shared]]:
    """Contexts with their continuations, those of one length together: documents of one length are one product."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    for place, (context, _) in enumerate(pairs):
        by_context.setdefault(tuple(context), []).append(place)
    groups = [_Shared(context, places) for context, places in by_context.items()]
    groups.sort(key=lambda group: (len(group.pairs) > 1, _size(group, pairs)), reverse=True)
    batch: list[_Shared] = []
    taken = 0
    for group in groups:
        size = _size(group, pairs)
        # Those with one continuation and those with several take different passes: only the latter share anything.
        if batch and (taken + size > pass_tokens or (len(group.pairs) > 1) != (len(batch[0].pairs) > 1)):
            yield batch
            batch, taken = [], 0
        batch.append(group)
        taken += size
    if batch:
        yield batch


def _size(group: _Shared, pairs: Sequence[Pair]) -> int:
    return len(group.context) - 1 + sum(len(pairs[place][1]) for place in group.pairs)


def _score_pass(model: HybridModel, pairs: Sequence[Pair], groups: Sequence[_Shared]) -> dict[int, Score]:
    batch, rows, labels, order = _packed(pairs, groups)
    device = next(model.parameters()).device
    hidden = model.hidden(to_device(batch, device), rows.to(device))
    step = max(1, LOGITS // max(1, model.spec.vocab_size))
    parts = [
        _label_scores(model, hidden[i : i + step], labels[i : i + step].to(device)) for i in range(0, len(rows), step)
    ]
    logprobs, greedy = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    lengths = [len(pairs[place][1]) for place in order]
    return {
        place: Score(float(here.double().sum()), bool(likeliest.all()))
        for place, here, likeliest in zip(order, logprobs.split(lengths), greedy.split(lengths), strict=True)
    }


def _packed(pairs: Sequence[Pair], groups: Sequence[_Shared]) -> tuple[PackedBatch, Tensor, Tensor, list[int]]:
    """One row of documents; the rows [n] whose next token is a label [n]; and the pairs in that order."""
    documents: list[list[int]] = []
    starts: list[int] = []  # position of each document's first token
    parents: list[int] = []
    shared = [group for group in groups if len(group.pairs) > 1 and len(group.context) > 1]
    for group in shared:
        documents.append(list(group.context[:-1]))
        starts.append(0)
        parents.append(-1)
    order: list[int] = []
    wholes = [(place, group) for group in groups if group not in shared for place in group.pairs]
    for place, group in wholes:
        documents.append([*group.context, *pairs[place][1][:-1]])
        starts.append(0)
        parents.append(-1)
        order.append(place)
    for parent, group in enumerate(shared):
        for place in group.pairs:
            documents.append([group.context[-1], *pairs[place][1][:-1]])
            starts.append(len(group.context) - 1)
            parents.append(parent)
            order.append(place)
    ends = list(accumulate(map(len, documents)))
    rows, labels = [], []
    for place, end in zip(order, ends[len(shared) :], strict=True):
        continuation = pairs[place][1]
        rows.append(np.arange(end - len(continuation), end))
        labels.append(np.array(continuation, np.int64))
    tokens = torch.tensor([token for document in documents for token in document])
    positions = [torch.arange(start, start + len(d)) for start, d in zip(starts, documents, strict=True)]
    numbers = [torch.full((len(d),), number, dtype=torch.int32) for number, d in enumerate(documents)]
    batch = PackedBatch(
        tokens=tokens[None],
        labels=None,
        loss_mask=None,
        position_ids=torch.cat(positions)[None],
        seq_idx=torch.cat(numbers)[None],
        cu_seqlens=torch.tensor([0, *ends], dtype=torch.int32),
        max_seqlen=max(map(len, documents)),
        num_tokens=0,
        source_ids=torch.zeros(1, dtype=torch.int32),
        sample_ids=torch.zeros(1, dtype=torch.int64),
        parents=torch.tensor(parents, dtype=torch.int32) if shared else None,
    )
    return batch, torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(labels)), order


def _label_scores(model: HybridModel, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [n, 1, d] and labels [n] -> (log p of each label fp32, whether it is the likeliest token)."""
    logits = model.next_logits(hidden, 1.0)
    tp, rank, size = model.context.groups.tp, model.context.groups.tp_rank, model.context.groups.tp_size
    rows = torch.tensor([logits.shape[1]], device=logits.device)
    first = 0
    if size > 1:
        counts = [torch.empty_like(rows) for _ in range(size)]
        dist.all_gather(counts, rows, group=tp)
        first = int(sum(counts[:rank]))
    if logits.shape[1]:
        highest, best = logits.max(1)
    else:  # a small vocabulary's last rank may have none of it
        highest, best = logits.new_full((len(logits),), -torch.inf), torch.zeros_like(labels)
    own = highest
    if size > 1:
        highest = highest.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=tp)
        best = torch.where(own == highest, best + first, model.spec.vocab_size)
        dist.all_reduce(best, dist.ReduceOp.MIN, group=tp)
    here = (labels >= first) & (labels < first + logits.shape[1])
    place = torch.where(here, labels - first, 0)[:, None]
    chosen = torch.where(here, logits.gather(1, place)[:, 0] if logits.shape[1] else 0.0, 0.0)
    total = (logits - highest[:, None]).exp().sum(1)
    if size > 1:
        sums = torch.stack([chosen, total])
        dist.all_reduce(sums, group=tp)
        chosen, total = sums
    return chosen - highest - total.log(), best == labels
