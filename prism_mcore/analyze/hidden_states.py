"""Hidden states of prompts at every layer, each the mean over a prompt's tokens, from the engine's own forward pass."""

# n prompts, l layers, t packed tokens, d hidden

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from prism_mcore.batch import PackedBatch
from prism_mcore.model.hybrid import HybridModel
from prism_mcore.model.spec import families
from prism_mcore.train.step import to_device

PASS_TOKENS = 4096  # of one forward pass; a longer prompt has a pass of its own

Tokens = Sequence[int]


@torch.inference_mode()
def pooled_states(
    model: HybridModel,
    prompts: Sequence[Tokens],
    *,
    pass_tokens: int = PASS_TOKENS,
    before_pass: Callable[[int], object] = lambda prompts: None,
) -> Tensor:
    """[n, l + 1, d] fp32: what enters each layer, the embedding first, and last what the final norm gives.

    Layers are those of the Hugging Face directory, and these are the means of its `hidden_states`. The model is whole
    on this rank or its tensor-parallel group, which all call it alike. before_pass: told how many prompts are next.
    """
    starts = range(0, len(model.layers), families()[model.spec.family].sublayers)
    pooled = torch.empty(len(prompts), len(starts) + 1, model.spec.hidden_size)
    device = next(model.parameters()).device
    with model.whole_sequences():
        for places in passes(prompts, pass_tokens):
            before_pass(len(places))
            batch = packed([prompts[place] for place in places])
            lengths = batch.document_lengths.tolist()
            pooled[places] = torch.stack(_means(model, to_device(batch, device), lengths, starts), dim=1).cpu()
    return pooled


def _means(model: HybridModel, batch: PackedBatch, lengths: list[int], starts: range) -> list[Tensor]:
    """[n, d] fp32 for each layer's input and the end."""
    found: list[Tensor] = []

    def keep(module: nn.Module, given: Any, output: tuple[Tensor, Tensor]) -> None:
        found.append(_mean(output[0], lengths))  # a sub-layer sums what enters it, and passes that on

    hooks = [model.layers[str(start)].register_forward_hook(keep) for start in starts]
    try:
        end = model.hidden(batch, torch.arange(sum(lengths), device=batch.position_ids.device))
    finally:
        for hook in hooks:
            hook.remove()
    return [*found, _mean(end, lengths)]


def _mean(x: Tensor, lengths: list[int]) -> Tensor:
    """[t, 1, d] -> the mean of each document [n, d], summed in fp32."""
    return torch.stack([part.mean(0, dtype=torch.float32) for part in x.squeeze(1).split(lengths)])


def passes(prompts: Sequence[Tokens], pass_tokens: int) -> Iterator[list[int]]:
    """Places of prompts that run together, those of like length next to each other."""
    batch: list[int] = []
    taken = 0
    for place in sorted(range(len(prompts)), key=lambda place: len(prompts[place]), reverse=True):
        if batch and taken + len(prompts[place]) > pass_tokens:
            yield batch
            batch, taken = [], 0
        batch.append(place)
        taken += len(prompts[place])
    if batch:
        yield batch


def packed(documents: Sequence[Tokens]) -> PackedBatch:
    """Documents one after the other, each isolated, without labels."""
    lengths = torch.tensor([len(document) for document in documents])
    numbers = torch.arange(len(documents), dtype=torch.int32)
    return PackedBatch(
        tokens=torch.tensor([token for document in documents for token in document])[None],
        labels=None,
        loss_mask=None,
        position_ids=torch.cat([torch.arange(len(document)) for document in documents])[None],
        seq_idx=torch.repeat_interleave(numbers, lengths)[None],
        cu_seqlens=torch.tensor([0, *accumulate(lengths.tolist())], dtype=torch.int32),
        max_seqlen=int(lengths.max()),
        num_tokens=0,
        source_ids=torch.zeros(1, dtype=torch.int32),
        sample_ids=torch.zeros(1, dtype=torch.int64),
    )
