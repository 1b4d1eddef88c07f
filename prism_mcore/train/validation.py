"""Validation: the loss of each domain on documents that training never sees, the same ones every time."""

import math
from dataclasses import replace

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from prism_mcore.agree import summed
from prism_mcore.batch import PackedBatch
from prism_mcore.data.loader import DataLoader
from prism_mcore.parallel import Groups
from prism_mcore.train.metrics import domain_losses
from prism_mcore.train.step import StepStats, forward_backward


@torch.no_grad()
def validate(
    chunks: list[DistributedDataParallel], loader: DataLoader, groups: Groups, max_samples: int
) -> dict[str, float]:
    """Nats per token of each domain, over at most `max_samples` sequences of each of its sources; empty without any.

    nan for a domain in which no label counts.
    """
    held_out = [source for source, opened in enumerate(loader.sources) if opened.validation is not None]
    if not held_out:
        return {}
    total: dict[str, Tensor] = {}
    for source in held_out:
        batches = _filled(list(loader.validation_batches(source, max_samples)), groups)
        sums, _ = forward_backward(chunks, batches, groups, len(loader.sources), forward_only=True)
        total = {name: total[name] + more if total else more for name, more in sums.items()}
    losses = domain_losses(loader.domains, StepStats.of(summed(total), []))
    return {domain: losses.get(domain, math.nan) for domain in (loader.domains[source] for source in held_out)}


def _filled(batches: list[PackedBatch], groups: Groups) -> list[PackedBatch]:
    """The interleaved schedule wants a multiple of the stages: copies of the last batch that do not count."""
    if groups.vpp == 1:
        return batches
    last = batches[-1]
    mask = None if last.loss_mask is None else torch.zeros_like(last.loss_mask)
    return batches + [replace(last, loss_mask=mask, num_tokens=0)] * (-len(batches) % groups.pp_size)
