"""Vocabulary-parallel cross entropy fused with the output projection; never holds the logits of the whole batch.

Per chunk of tokens: logits, then in their place e = exp(logit - row maximum), whose row sums give log-sum-exp. The
gradient is taken from e itself: its row scale (weight / row sum) goes to the [n, d] sides of the two products and the
label's term is added apart, so that nothing but e is ever written at the size of the logits.
"""

# t packed tokens, n tokens of a chunk, d hidden, v vocabulary (local rows that are real tokens)

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from prism_kernels.matmul import mm
from prism_kernels.precision import accumulate_dtype

LOG2_E = math.log2(math.e)
ROWS = 64  # of a chunk's logits worked on at a time: 64 x 8,192 in fp32 is 2 MiB, about a core's L2 cache


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None,
    logits_divisor: float = 1.0,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 512,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label under softmax(hidden @ weight.T / logits_divisor), with its gradients.

    hidden: [t, d], weight: [v_local, d], labels: [t] int64 in [0, vocab_size). Over a process `group`, rank r holds
    rows [r * v_local, (r + 1) * v_local) of the vocabulary; rows >= vocab_size are padding and never enter the softmax.
    With token_weights [t]: (sum of token_weights * nll, log-probabilities [t] fp32, detached); gradients are computed
    in the forward pass (three products). Without: log-probabilities [t] fp32, differentiable (four products).
    The gradient of hidden is this rank's part: the sum over the group is the caller's. For bf16 inputs the logits are a
    bf16 product, the statistics fp32; the weight's gradient is summed in fp32 and returned in weight.dtype.
    Errors: shapes that do not agree, labels outside the vocabulary.
    """
    if hidden.shape[0] != labels.shape[0]:
        raise ValueError(f"linear_cross_entropy: {hidden.shape[0]} rows in hidden, {labels.shape[0]} labels")
    if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < vocab_size:
        raise ValueError(
            f"linear_cross_entropy: labels run from {int(labels.min())} to {int(labels.max())}, "
            f"the vocabulary from 0 to {vocab_size - 1}"
        )
    group = group if group is not None and dist.get_world_size(group) > 1 else None
    shard = _Shard.of(weight, vocab_size, group)
    if token_weights is None:
        return _LogProbs.apply(hidden, weight, labels, shard, logits_divisor, chunk_tokens)
    return _WeightedLoss.apply(hidden, weight, labels, token_weights, shard, logits_divisor, chunk_tokens)


class _Shard(NamedTuple):
    """Which tokens of the vocabulary this rank holds: [first, first + rows)."""

    first: int
    rows: int
    group: dist.ProcessGroup | None

    @staticmethod
    def of(weight: Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> "_Shard":
        first = len(weight) * (dist.get_rank(group) if group is not None else 0)
        return _Shard(first, max(0, min(len(weight), vocab_size - first)), group)

    def find(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each label's local row (some row where it is not ours), and whether it is ours."""
        local = labels - self.first
        return local.clamp(0, max(0, self.rows - 1)), (local >= 0) & (local < self.rows)


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))


def _log_softmax_parts(
    logits: Tensor, labels: Tensor, shard: _Shard, divisor: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(local row maximum, log-sum-exp over the whole vocabulary, label's logit), each [n], divided by the divisor.

    Where `keep`, the logits become exp((logit - row maximum) / divisor), in place.
    """
    acc = accumulate_dtype(logits.dtype)
    if shard.rows:
        local, ours = shard.find(labels)
        target = torch.where(ours, logits.gather(1, local[:, None])[:, 0], 0).to(acc) / divisor
        highest, sums = _exponentials(logits, None, divisor, keep)
        lse = sums.log() + highest / divisor
    else:
        target = logits.new_zeros(len(labels), dtype=acc)
        highest = lse = torch.full_like(target, -torch.inf)
    if shard.group is not None:
        mine = torch.stack([lse, target])
        every = mine.new_empty(dist.get_world_size(shard.group), *mine.shape)
        dist.all_gather_into_tensor(every.flatten(0, 1), mine, group=shard.group)
        lse, target = every[:, 0].logsumexp(0), every[:, 1].sum(0)
    return highest / divisor, lse, target


def _exponentials(logits: Tensor, base: Tensor | None, divisor: float, keep: bool) -> tuple[Tensor, Tensor]:
    """(base, sums over rows of exp((logits - base) / divisor)), each [n]; base is the row maximum where None.

    Where `keep`, the exponentials take the logits' place.
    """
    sums = torch.empty(len(logits), dtype=accumulate_dtype(logits.dtype), device=logits.device)
    highest = torch.empty_like(sums) if base is None else base
    for rows in _chunks(len(logits), ROWS):
        block = logits[rows]
        wide = block.to(sums.dtype)  # the block itself in fp32 and fp64
        if base is None:
            torch.amax(wide, 1, out=highest[rows])
        shift = highest[rows, None] * (-LOG2_E / divisor)
        torch.add(shift, wide, alpha=LOG2_E / divisor, out=wide).exp2_()
        torch.sum(wide, 1, out=sums[rows])
        if keep and wide is not block:
            block.copy_(wide)
    return highest, sums


class _Gradients:
    """Sums the gradients chunk by chunk; grad_logits = coefficient * (softmax - onehot)."""

    def __init__(self, hidden: Tensor, weight: Tensor, shard: _Shard, wanted: tuple[bool, bool]) -> None:
        self.inputs, self.shard = (hidden, weight[: shard.rows]), shard
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        acc = accumulate_dtype(hidden.dtype)
        self.weight = torch.zeros_like(weight, dtype=acc) if wanted[1] else None

    def add(self, part: slice, labels: Tensor, exponentials: Tensor, scale: Tensor, coefficient: Tensor) -> None:
        """scale * exponentials [n, v] = coefficient * softmax; both factors are [n, 1] in the accumulation dtype."""
        hidden, rows = self.inputs[0][part], self.inputs[1]
        if not self.shard.rows:
            if self.hidden is not None:
                self.hidden[part] = 0
            return
        local, ours = self.shard.find(labels)
        coefficient = coefficient * ours[:, None]
        if self.hidden is not None:
            grad = mm(exponentials, rows).to(scale.dtype).mul_(scale)
            self.hidden[part] = grad.sub_(coefficient * rows[local])
        if self.weight is not None:
            _add_to(self.weight, mm(exponentials.t(), (hidden * scale).to(hidden.dtype)))
            self.weight.index_add_(0, local, (hidden * -coefficient).to(self.weight.dtype))

    def result(self, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return self.hidden, None if self.weight is None else self.weight.to(weight.dtype)


def _add_to(total: Tensor, part: Tensor) -> None:
    """total[: len(part)] += part, widened in blocks: a mixed-dtype add first widens all of it to fresh memory."""
    if part.dtype == total.dtype:
        total[: len(part)] += part
        return
    for rows in _chunks(len(part), 1024):
        total[rows] += part[rows].to(total.dtype)


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, token_weights, shard, divisor, chunk_tokens):
        wanted = ctx.needs_input_grad[:2]
        gradients = _Gradients(hidden, weight, shard, wanted)
        logprobs = torch.empty(len(labels), dtype=accumulate_dtype(hidden.dtype), device=hidden.device)
        token_weights = token_weights.to(logprobs.dtype)
        for part in _chunks(len(labels), chunk_tokens):
            logits = mm(hidden[part], weight[: shard.rows].t())
            highest, lse, target = _log_softmax_parts(logits, labels[part], shard, divisor, keep=any(wanted))
            logprobs[part] = target - lse
            if any(wanted):
                coefficient = token_weights[part, None] / divisor
                scale = coefficient * (highest - lse).exp()[:, None]
                gradients.add(part, labels[part], logits, scale, coefficient)
        ctx.gradients = gradients.result(weight)
        ctx.mark_non_differentiable(logprobs)
        return -(logprobs * token_weights).sum(), logprobs

    @staticmethod
    def backward(ctx, grad_loss, _):
        scaled = (None if g is None else g * grad_loss.to(g.dtype) for g in ctx.gradients)
        return *scaled, *(None,) * 5


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, shard, divisor, chunk_tokens):
        lse = torch.empty(len(labels), dtype=accumulate_dtype(hidden.dtype), device=hidden.device)
        logprobs = torch.empty_like(lse)
        for part in _chunks(len(labels), chunk_tokens):
            logits = mm(hidden[part], weight[: shard.rows].t())
            _, lse[part], target = _log_softmax_parts(logits, labels[part], shard, divisor, keep=False)
            logprobs[part] = target - lse[part]
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.settings = shard, divisor, chunk_tokens
        return logprobs

    @staticmethod
    def backward(ctx, grad_logprobs):
        hidden, weight, labels, lse = ctx.saved_tensors
        shard, divisor, chunk_tokens = ctx.settings
        gradients = _Gradients(hidden, weight, shard, ctx.needs_input_grad[:2])
        for part in _chunks(len(labels), chunk_tokens):
            logits = mm(hidden[part], weight[: shard.rows].t())
            _exponentials(logits, lse[part] * divisor, divisor, keep=True)
            coefficient = -grad_logprobs[part, None] / divisor
            gradients.add(part, labels[part], logits, coefficient, coefficient)
        return *gradients.result(weight), *(None,) * 4
