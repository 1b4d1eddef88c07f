"""One policy update: forward and backward over this rank's micro-batches, ready for the optimizer; and scoring."""

# t packed tokens of a micro-batch

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from prism_mcore.agree import summed
from prism_mcore.batch import PolicyBatch
from prism_mcore.parallel import Groups
from prism_mcore.rl.policy_loss import LossTerms, policy_loss
from prism_mcore.rl.settings import PolicySettings
from prism_mcore.train.optimizer import DistributedDataParallel, MegatronOptimizer, norm_of, squared_gradient_norm
from prism_mcore.train.pipeline import run_pipeline
from prism_mcore.train.step import to_device


@dataclass(frozen=True)
class Gap:
    """The largest |log-prob in training - log-prob at sampling| of an update: `Gap(0.003, rollout=17, position=5)`."""

    size: float
    rollout: int  # its place among the step's rollouts; -1: there was no token
    position: int  # in the response


NO_GAP = Gap(0.0, -1, -1)
MEAN = "mean/"  # before the names of sums over the tokens in the loss that are logged as means


@dataclass(frozen=True)
class PolicyStats:
    """What an update saw, the same on every rank but for `losses`. Means are over the loss's tokens, nan without."""

    loss: float
    grad_norm: float
    tokens: int  # in the loss
    on_policy: int  # of them, sampled with the weights that the update starts from
    means: dict[str, float]  # by metric, `LossTerms.means`
    ratio_max: float  # of pi / pi_old
    gap_mean: float  # of |log-prob in training - at sampling|, nats, over on-policy tokens
    gap: Gap
    losses: Tensor  # [micro-batches] of this rank, on the device

    @property
    def row_losses(self) -> list[list[float]]:
        """Of this rank's micro-batches: [[loss], ...]. Waits for the device."""
        return [[loss] for loss in self.losses.tolist()]


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
        total, terms = policy_loss(logprobs, entropy, batch, settings)
        seen.append(_Seen.of(terms, batch))
        # megatron-core divides the gradient by the number of tokens on all ranks. The weights already hold every
        # denominator, so the count is 1: one rank's first micro-batch has it, the others 0.
        counted = int(groups.dp_rank == 0 and len(seen) == 1)
        # torch.tensor would copy the number from the CPU, and wait for the device.
        return total, torch.full((), counted, dtype=torch.int, device=total.device), total.detach()

    _run(chunks, batches, loss, forward_only=False)
    sums = _summed_here(seen, groups)
    sums["squared_norm"] = squared_gradient_norm(optimizer, groups, sums["loss"].device)
    return _stats(summed(sums), torch.stack([part.sums["loss"] for part in seen]))


@torch.no_grad()
def score(chunks: list[DistributedDataParallel], batches: list[PolicyBatch]) -> list[Tensor]:
    """Log-probs of every label of this rank's micro-batches, [1, t] fp32 each, on the device."""

    def report(output: tuple[Tensor, Tensor], batch: PolicyBatch, non_loss_data: bool = True) -> Tensor:
        return output[0].view_as(batch.labels)

    return _run(chunks, batches, report, forward_only=True)


def _run(
    chunks: list[DistributedDataParallel], batches: list[PolicyBatch], loss: Callable, forward_only: bool
) -> list[Tensor]:
    def forward(data: Iterator[PolicyBatch], chunk: DistributedDataParallel):
        batch = to_device(next(data), next(chunk.parameters()).device)
        return chunk(batch, temperature=batch.temperature), partial(loss, batch=batch)

    return run_pipeline(
        forward,
        chunks,
        lambda: iter(batches),
        num_micro_batches=len(batches),
        num_tokens=batches[0].position_ids.numel(),
        forward_only=forward_only,
        collect=forward_only,
    )


@dataclass(frozen=True)
class _Seen:
    """What one micro-batch saw, still on the device."""

    sums: dict[str, Tensor]  # [] fp64 each, over the tokens in the loss
    largest: Tensor  # [4] fp64: ratio; gap, and the rollout and position that have it

    @staticmethod
    def of(terms: LossTerms, batch: PolicyBatch) -> "_Seen":
        assert batch.loss_mask is not None
        mask = batch.loss_mask.flatten()
        on_policy = mask & batch.on_policy.flatten()
        columns = {
            "loss": terms.loss,
            "tokens": mask,
            "gap": terms.gap * on_policy,
            "on_policy": on_policy,
            **{MEAN + name: torch.where(mask, value, 0) for name, value in terms.means.items()},
        }
        # NaN is the largest gap of all
        gaps = torch.where(on_policy, terms.gap.double().nan_to_num(nan=math.inf), -1.0)
        largest, token = gaps.max(0, keepdim=True)  # [1] each: an index without dimensions is read by the CPU
        ratio = torch.where(mask, terms.ratio, 0.0).max(0, keepdim=True).values.double()
        documents = batch.seq_idx.flatten().long()
        document = documents[token]
        first = (mask & (documents == document)).int().argmax()
        place = torch.cat([batch.rollout_ids[document], token - first]).double()
        sums = {name: column.sum(dtype=torch.float64) for name, column in columns.items()}
        return _Seen(sums, torch.cat([ratio, largest, place]))


def _summed_here(seen: list[_Seen], groups: Groups) -> dict[str, Tensor]:
    """What this rank adds to the sums over all: those of its micro-batches, and its row of `largest` [dp x cp, 4].

    Tensor-parallel ranks all have the same.
    """
    largest = seen[0].largest.new_zeros(groups.dp_cp.size(), 4)
    if groups.tp_rank:
        return {name: torch.zeros_like(value) for name, value in seen[0].sums.items()} | {"largest": largest}
    table = torch.stack([torch.stack([*part.sums.values()]) for part in seen]).sum(0)
    every = torch.stack([part.largest for part in seen])
    row = largest[groups.dp_cp.rank()]
    row.copy_(every[every[:, 1].argmax(0, keepdim=True)][0])  # an index without dimensions is read by the CPU
    row[0] = every[:, 0].max()
    return dict(zip(seen[0].sums, table.unbind(), strict=True)) | {"largest": largest}


def _stats(sums: dict[str, Tensor], losses: Tensor) -> PolicyStats:
    """sums: over all ranks, on the CPU."""
    ratios, gaps, rollouts, positions = sums["largest"].unbind(1)
    worst = int(gaps.argmax())
    tokens, on_policy = int(sums["tokens"]), int(sums["on_policy"])

    return PolicyStats(
        loss=float(sums["loss"]),
        grad_norm=norm_of(sums["squared_norm"]),
        tokens=tokens,
        on_policy=on_policy,
        means={
            name.removeprefix(MEAN): float(total) / tokens if tokens else math.nan
            for name, total in sums.items()
            if name.startswith(MEAN)
        },
        ratio_max=float(ratios.max()),
        gap_mean=float(sums["gap"]) / on_policy if on_policy else 0.0,
        gap=Gap(float(gaps[worst]), int(rollouts[worst]), int(positions[worst])) if gaps[worst] >= 0 else NO_GAP,
        losses=losses,
    )
