"""Validation: the loss of each domain on documents that training never sees, the same ones every time."""

from dataclasses import replace

import torch
from megatron.core.distributed import DistributedDataParallel

from prism_mcore.batch import PackedBatch
from prism_mcore.data.loader import DataLoader
from prism_mcore.parallel import Groups
from prism_mcore.train.step import forward_backward


@torch.no_grad()
def validate(
    chunks: list[DistributedDataParallel], loader: DataLoader, groups: Groups, max_samples: int
) -> dict[str, float]:
    """Nats per token of each domain, over at most `max_samples` sequences of each of its sources; empty without any."""
    nats: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for source, domain in enumerate(loader.domains):
        if loader.sources[source].validation is None:
            continue
        batches = _filled(list(loader.validation_batches(source, max_samples)), groups)
        stats = forward_backward(chunks, batches, groups, len(loader.sources), forward_only=True)
        nats[domain] = nats.get(domain, 0.0) + stats.source_loss[source] * stats.source_tokens[source]
        tokens[domain] = tokens.get(domain, 0) + stats.source_tokens[source]
    return {domain: nats[domain] / tokens[domain] for domain in nats}


def _filled(batches: list[PackedBatch], groups: Groups) -> list[PackedBatch]:
    """The interleaved schedule wants a multiple of the stages: copies of the last batch that do not count."""
    if groups.vpp == 1:
        return batches
    last = batches[-1]
    mask = None if last.loss_mask is None else torch.zeros_like(last.loss_mask)
    return batches + [replace(last, loss_mask=mask, num_tokens=0)] * (-len(batches) % groups.pp_size)
