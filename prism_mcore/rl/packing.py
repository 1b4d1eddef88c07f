"""From a step's rollouts, known to every rank, to this rank's micro-batches: the same rule in every layout."""

# t packed tokens of a micro-batch

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from prism_mcore.batch import PolicyBatch, Rollout, RolloutGroup
from prism_mcore.rl.advantage import advantages, has_spread
from prism_mcore.rl.aggregation import AGGREGATIONS
from prism_mcore.rl.settings import PolicySettings
from prism_mcore.rl.shaping import is_cut


@dataclass(frozen=True)
class Sample:
    """A rollout that is in the loss: `Sample(id=5, rollout=..., advantage=1.73, weight=0.004)`."""

    id: int  # its place among the step's rollouts
    rollout: Rollout
    advantage: float
    weight: float  # of each of its tokens, 1 / denominator

    @property
    def length(self) -> int:
        """Tokens of its document: the last one is only ever a label."""
        return len(self.rollout.prompt_tokens) + len(self.rollout.tokens) - 1


def samples_of(
    groups: Sequence[RolloutGroup],
    settings: PolicySettings,
    first_id: int = 0,
    *,
    longest: int = 0,
    values: Sequence[np.ndarray] | None = None,
) -> list[Sample]:
    """The rollouts of one update that are in its loss, with their advantages and weights.

    Left out: invalid rollouts, empty responses, groups without spread under `rl.drop_zero_spread`, and those that were
    cut under `rl.overlong=mask`. longest: tokens that a response may have. values: advantages by group, where they are
    known of more groups than these.
    """
    if values is None:
        values = advantages(groups, settings.advantage, settings.advantage_eps)
    kept = [not settings.drop_zero_spread or has_spread(group) for group in groups]
    lengths = [
        [len(rollout.tokens) if keep and _counts(rollout, settings) else 0 for rollout in group.rollouts]
        for group, keep in zip(groups, kept, strict=True)
    ]
    samples, place = [], first_id
    all_weights = AGGREGATIONS[settings.aggregation](lengths, longest)
    for group, weights, of_group in zip(groups, all_weights, values, strict=True):
        for rollout, weight, advantage in zip(group.rollouts, weights, of_group, strict=True):
            if weight:
                samples.append(Sample(place, rollout, float(advantage), weight))
            place += 1
    return samples


def _counts(rollout: Rollout, settings: PolicySettings) -> bool:
    return rollout.valid and not (settings.overlong == "mask" and is_cut(rollout))


def micro_batches(lengths: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Documents of these lengths to (data-parallel rank, micro-batch): places in `lengths`, by rank and micro-batch.

    The longest first (of equals the earlier one), each to the rank with the fewest tokens so far (of equals the lower
    one), into its first micro-batch where it fits within `budget` tokens; a document above the budget is alone.
    """
    batches: list[list[list[int]]] = [[] for _ in range(ranks)]
    room: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = tokens.index(min(tokens))
        tokens[rank] += lengths[place]
        number = next((n for n, free in enumerate(room[rank]) if lengths[place] <= free), len(room[rank]))
        if number == len(room[rank]):
            batches[rank].append([])
            room[rank].append(budget)
        batches[rank][number].append(place)
        room[rank][number] -= lengths[place]
    return batches


def units(samples: Sequence[Sample], ranks: int, budget: int) -> list[tuple[Sample, ...]]:
    """Samples that are to be in one micro-batch, for they share their prompt: of a group as many as fit, in order.

    Within `budget` tokens, the prompt counted once, and within an eighth of a rank's part of all tokens, so that ranks
    can be dealt equal parts.
    """
    lengths = [sample.length for sample in samples]
    most = min(budget, max(sum(lengths) // (8 * ranks), max(lengths, default=0)))
    made: list[list[Sample]] = []
    for sample in samples:
        fits = made and made[-1][0].rollout.prompt_tokens == sample.rollout.prompt_tokens
        if fits and unit_length(made[-1]) + len(sample.rollout.tokens) <= most:
            made[-1].append(sample)
        else:
            made.append([sample])
    return [tuple(unit) for unit in made]


def unit_length(unit: Sequence[Sample]) -> int:
    """Tokens of samples that share their prompt."""
    return len(unit[0].rollout.prompt_tokens) - 1 + sum(len(sample.rollout.tokens) for sample in unit)


@dataclass(frozen=True)
class _Document:
    """Tokens of a micro-batch that follow one another, the last one only ever a label, and what they continue."""

    text: tuple[int, ...]
    first: int = 0  # its first token's position
    parent: int = -1  # the document that it continues the end of
    sample: Sample | None = None  # whose response it ends with; None: a prompt, or padding


def _documents(samples: Sequence[Sample], share: bool) -> list[_Document]:
    """Those that continue nothing first."""
    whole: list[_Document] = []
    continuations: list[_Document] = []
    for prompt, same in groupby(samples, key=lambda sample: sample.rollout.prompt_tokens):
        members = list(same)
        if share and len(members) > 1 and len(prompt) > 1:
            parent, at = len(whole), len(prompt) - 1
            whole.append(_Document(prompt))
            texts = [(prompt[-1], *sample.rollout.tokens) for sample in members]
            continuations += [_Document(text, at, parent, s) for text, s in zip(texts, members, strict=True)]
        else:
            whole += [_Document(prompt + sample.rollout.tokens, sample=sample) for sample in members]
    return whole + continuations


def pack(
    samples: Sequence[Sample], *, version: int, temperature: float, multiple: int = 1, share: bool = False
) -> PolicyBatch:
    """One micro-batch of rollouts; without any it is a filler that weighs nothing.

    version: optimizer steps the weights have seen, which makes a token on-policy or not. multiple: the packed length is
    filled up to a multiple of it. share: samples of one prompt that follow one another have it once.
    """
    documents = _documents(samples, share)
    filler = -sum(len(document.text) - 1 for document in documents) % multiple if documents else multiple
    if filler:
        place = sum(document.parent < 0 for document in documents)
        documents.insert(place, _Document((0,) * (filler + 1)))
    lengths = [len(document.text) - 1 for document in documents]
    ends = np.cumsum([0, *lengths])
    t = int(ends[-1])
    tokens, labels, positions = (np.zeros(t, np.int64) for _ in range(3))
    mask, on_policy = np.zeros(t, bool), np.ones(t, bool)
    advantages, sampled, weights = (np.zeros(t, np.float32) for _ in range(3))
    for document, start, end in zip(documents, ends[:-1], ends[1:], strict=True):
        tokens[start:end], labels[start:end] = document.text[:-1], document.text[1:]
        positions[start:end] = np.arange(end - start) + document.first
        if document.sample is not None:
            sample, rollout = document.sample, document.sample.rollout
            response = slice(end - len(rollout.tokens), end)
            mask[response] = True
            advantages[response], weights[response] = sample.advantage, sample.weight
            sampled[response], on_policy[response] = rollout.logprobs, rollout.versions == version
    parents = [document.parent for document in documents]
    return PolicyBatch(
        tokens=_row(tokens),
        labels=_row(labels),
        loss_mask=_row(mask),
        position_ids=_row(positions),
        seq_idx=_row(np.repeat(np.arange(len(documents), dtype=np.int32), lengths)),
        cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
        max_seqlen=max(document.first + length for document, length in zip(documents, lengths, strict=True)),
        num_tokens=int(mask.sum()),
        source_ids=torch.zeros(1, dtype=torch.int32),
        sample_ids=torch.zeros(1, dtype=torch.int64),
        advantages=_row(advantages),
        sampler_logprobs=_row(sampled),
        on_policy=_row(on_policy),
        weights=_row(weights),
        rollout_ids=torch.tensor([-1 if d.sample is None else d.sample.id for d in documents]),
        temperature=temperature,
        parents=torch.tensor(parents, dtype=torch.int32) if max(parents) >= 0 else None,
    )


def _row(values: np.ndarray) -> Tensor:
    """[t] -> [1, t], pinned where there is a device to copy it to."""
    row = torch.from_numpy(values)[None]
    return row.pin_memory() if torch.cuda.is_available() else row
