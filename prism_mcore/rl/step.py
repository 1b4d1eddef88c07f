"""One policy update: forward and backward over this rank's micro-batches, ready for the optimizer; and scoring."""

# t packed tokens of a micro-batch

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from prism_mcore.batch import PolicyBatch
from prism_mcore.parallel import Groups
from prism_mcore.rl.policy_loss import LossTerms, policy_loss
from prism_mcore.rl.settings import PolicySettings
from prism_mcore.train.optimizer import gradient_norm
from prism_mcore.train.step import to_device


@dataclass(frozen=True)
class Gap:
    """The largest |log-prob in training - log-prob at sampling| of an update: `Gap(0.003, rollout=17, position=5)`."""

    size: float
    rollout: int  # its place among the step's rollouts; -1: there was no token
    position: int  # in the response


@dataclass(frozen=True)
class PolicyStats:
    """What an update saw, the same on every rank. Means are over the tokens in the loss, nan where there are none."""

    loss: float
    grad_norm: float
    tokens: int  # in the loss
    on_policy: int  # of them, sampled with the weights that the update starts from
    entropy: float  # of the policy at the sampler's temperature, nats per token
    kl: float  # to the reference, by the estimator in use; 0 without one
    clipped_low: float  # share of tokens
    clipped_high: float
    ratio_max: float  # of pi / pi_old
    correction: float  # mean importance weight
    capped: float  # share of tokens whose importance weight was cut to the cap
    gap_mean: float  # of |log-prob in training - at sampling|, nats, over on-policy tokens
    gap: Gap
    row_losses: list[list[float]]  # of this rank's micro-batches: [[loss], ...]


def policy_backward(
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: list[PolicyBatch],
    settings: PolicySettings,
    groups: Groups,
) -> PolicyStats:
    """Gradients of the policy loss over all ranks' micro-batches, ready in `optimizer`; no weight changes yet."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    seen: list[_Seen] = []

    def loss(output: tuple[Tensor, Tensor], batch: PolicyBatch) -> tuple[Tensor, Tensor, Tensor]:
        logprobs, entropy = output
        total, terms = policy_loss(logprobs, batch, settings)
        seen.append(_Seen.of(terms, entropy, batch, settings))
        # megatron-core divides the gradient by the number of tokens on all ranks. The weights already hold every
        # denominator, so the count is 1: one rank's first micro-batch has it, the others 0.
        counted = int(groups.dp_rank == 0 and len(seen) == 1)
        # torch.tensor would copy the number from the CPU, and wait for the device.
        return total, torch.full((), counted, dtype=torch.int, device=total.device), total.detach()

    _run(chunks, batches, loss, forward_only=False)
    return replace(_reduced(seen, groups), grad_norm=gradient_norm(optimizer))


@torch.no_grad()
def score(chunks: list[DistributedDataParallel], batches: list[PolicyBatch]) -> list[Tensor]:
    """Log-probs of every label of this rank's micro-batches, [1, t] fp32 each, on the CPU."""

    def report(output: tuple[Tensor, Tensor], batch: PolicyBatch, non_loss_data: bool = True) -> Tensor:
        return output[0].view_as(batch.labels).cpu()

    return _run(chunks, batches, report, forward_only=True)


def _run(
    chunks: list[DistributedDataParallel], batches: list[PolicyBatch], loss: Callable, forward_only: bool
) -> list[Tensor]:
    def forward(data: Iterator[PolicyBatch], chunk: DistributedDataParallel):
        batch = to_device(next(data), next(chunk.parameters()).device)
        return chunk(batch, temperature=batch.temperature), partial(loss, batch=batch)

    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(batches),
        model=chunks[0],  # RL has no pipeline
        num_microbatches=len(batches),
        seq_length=batches[0].position_ids.numel(),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


@dataclass(frozen=True)
class _Seen:
    """One micro-batch's sums over the tokens in the loss, still on the device."""

    sums: Tensor  # [10] fp64
    highest: Tensor  # [2] fp64: ratio, gap
    place: Tensor  # [2] int64: rollout and position of the largest gap

    @staticmethod
    def of(terms: LossTerms, entropy: Tensor, batch: PolicyBatch, settings: PolicySettings) -> "_Seen":
        assert batch.loss_mask is not None
        mask = batch.loss_mask.flatten()
        on_policy = mask & batch.on_policy.flatten()
        capped = terms.correction >= settings.tis_cap if settings.tis_cap else torch.zeros_like(mask)
        columns = [
            terms.loss,
            mask,
            entropy * mask,
            terms.kl * mask,
            terms.clipped_low & mask,
            terms.clipped_high & mask,
            terms.correction * mask,
            capped & mask,
            terms.gap * on_policy,
            on_policy,
        ]
        sums = torch.stack([column.sum(dtype=torch.float64) for column in columns])
        # NaN is the largest gap of all
        gaps = torch.where(on_policy, terms.gap.double().nan_to_num(nan=math.inf), -1.0)
        largest, token = gaps.max(0, keepdim=True)  # [1] each: an index without dimensions is read by the CPU
        ratio = torch.where(mask, terms.ratio, 0.0).max(0, keepdim=True).values.double()
        documents = batch.seq_idx.flatten().long()
        document = documents[token]
        first = (mask & (documents == document)).int().argmax()
        place = torch.cat([batch.rollout_ids[document], token - first])
        return _Seen(sums, torch.cat([ratio, largest]), place)


def _reduced(seen: list[_Seen], groups: Groups) -> PolicyStats:
    sums = torch.stack([part.sums for part in seen]).sum(0)
    dist.all_reduce(sums, group=groups.dp_cp)
    mine = torch.stack([torch.cat([part.highest, part.place.double()]) for part in seen])
    every = mine.new_empty(groups.dp_cp.size(), 4)
    best = mine[mine[:, 1].argmax()].clone()
    best[0] = mine[:, 0].max()
    dist.all_gather_into_tensor(every, best[None], group=groups.dp_cp)
    ratios, gaps, rollouts, positions = every.cpu().unbind(1)
    worst = int(gaps.argmax())
    found = gaps[worst] >= 0
    loss, tokens, entropy, kl, low, high, importance, capped, gap, on_policy = sums.tolist()

    def mean(total: float) -> float:
        return total / tokens if tokens else math.nan

    return PolicyStats(
        loss=loss,
        grad_norm=math.nan,
        tokens=int(tokens),
        on_policy=int(on_policy),
        entropy=mean(entropy),
        kl=mean(kl),
        clipped_low=mean(low),
        clipped_high=mean(high),
        ratio_max=float(ratios.max()),
        correction=mean(importance),
        capped=mean(capped),
        gap_mean=gap / on_policy if on_policy else 0.0,
        gap=Gap(float(gaps[worst]), int(rollouts[worst]), int(positions[worst])) if found else Gap(0.0, -1, -1),
        row_losses=[[loss] for loss in torch.stack([part.sums[0] for part in seen]).tolist()],
    )
