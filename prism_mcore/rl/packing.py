"""From a step's rollouts, known to every rank, to this rank's micro-batches: the same rule in every layout."""

# t packed tokens of a micro-batch

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prism_mcore.batch import PolicyBatch, Rollout, RolloutGroup
from prism_mcore.rl.advantage import group_advantages, has_spread
from prism_mcore.rl.aggregation import AGGREGATIONS
from prism_mcore.rl.settings import PolicySettings


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


def samples_of(groups: Sequence[RolloutGroup], settings: PolicySettings, first_id: int = 0) -> list[Sample]:
    """The rollouts of one update that are in its loss, with their advantages and weights.

    Left out: invalid rollouts, empty responses, and groups without spread under `rl.drop_zero_spread`.
    """
    kept = [not settings.drop_zero_spread or has_spread(group) for group in groups]
    lengths = [
        [len(rollout.tokens) if keep and rollout.valid else 0 for rollout in group.rollouts]
        for group, keep in zip(groups, kept, strict=True)
    ]
    samples, place = [], first_id
    for group, weights in zip(groups, AGGREGATIONS[settings.aggregation](lengths), strict=True):
        advantages = group_advantages(group, settings.advantage, settings.advantage_eps)
        for rollout, weight, advantage in zip(group.rollouts, weights, advantages, strict=True):
            if weight:
                samples.append(Sample(place, rollout, float(advantage), weight))
            place += 1
    return samples


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


def pack(samples: Sequence[Sample], *, version: int, temperature: float, multiple: int = 1) -> PolicyBatch:
    """One micro-batch of whole rollouts; without any it is a filler that weighs nothing.

    version: optimizer steps the weights have seen, which makes a token on-policy or not. multiple: the packed length is
    filled up to a multiple of it.
    """
    lengths = [sample.length for sample in samples]
    filler = -sum(lengths) % multiple if lengths else multiple
    documents = lengths + [filler] * (filler > 0)
    ends = np.cumsum([0, *documents])
    t = int(ends[-1])
    tokens, labels = np.zeros(t, np.int64), np.zeros(t, np.int64)
    mask, on_policy = np.zeros(t, bool), np.ones(t, bool)
    advantages, sampled, weights = (np.zeros(t, np.float32) for _ in range(3))
    for sample, start, end in zip(samples, ends[:-1], ends[1:], strict=False):
        rollout = sample.rollout
        text = rollout.prompt_tokens + rollout.tokens
        tokens[start:end], labels[start:end] = text[:-1], text[1:]
        response = slice(end - len(rollout.tokens), end)
        mask[response] = True
        advantages[response], weights[response] = sample.advantage, sample.weight
        sampled[response], on_policy[response] = rollout.logprobs, rollout.versions == version
    return PolicyBatch(
        tokens=_row(tokens),
        labels=_row(labels),
        loss_mask=_row(mask),
        position_ids=_row(np.arange(t) - np.repeat(ends[:-1], documents)),
        seq_idx=_row(np.repeat(np.arange(len(documents), dtype=np.int32), documents)),
        cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
        max_seqlen=max(documents),
        num_tokens=int(mask.sum()),
        source_ids=torch.zeros(1, dtype=torch.int32),
        sample_ids=torch.zeros(1, dtype=torch.int64),
        advantages=_row(advantages),
        sampler_logprobs=_row(sampled),
        on_policy=_row(on_policy),
        weights=_row(weights),
        rollout_ids=torch.tensor([sample.id for sample in samples] + [-1] * (filler > 0)),
        temperature=temperature,
    )


def _row(values: np.ndarray) -> Tensor:
    """[t] -> [1, t], pinned where there is a device to copy it to."""
    row = torch.from_numpy(values)[None]
    return row.pin_memory() if torch.cuda.is_available() else row
