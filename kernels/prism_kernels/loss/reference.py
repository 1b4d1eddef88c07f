"""Vocabulary-parallel cross entropy fused with the output projection; never holds the logits of the whole batch.

Per chunk of tokens: logits, then in their place e = exp(logit - row maximum), whose row sums give log-sum-exp. The
gradient is taken from e itself: its row scale (weight / row sum) goes to the [n, d] sides of the two products and the
label's term is added apart, so that nothing but e is ever written at the size of the logits.
"""

# t packed tokens, n tokens of a chunk, d hidden, v vocabulary (local rows that are real tokens)

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from prism_kernels.matmul import mm
from prism_kernels.precision import LOG2_E, accumulate_dtype

CHUNK_TOKENS = 512
CHUNK_ROWS = 4096  # of a bf16 weight widened at a time

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
    chunk_tokens: int | None = None,
    return_entropy: bool = False,
    fp32_logits: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Log-probability of each label under softmax(hidden @ weight.T / logits_divisor), with its gradients.

    hidden: [t, d], weight: [v_local, d], labels: [t] int64 in [0, vocab_size). Over a process `group`, rank r holds
    rows [r * v_local, (r + 1) * v_local) of the vocabulary; rows >= vocab_size are padding and never enter the softmax.
    With token_weights [t]: (sum of token_weights * nll, log-probabilities [t] fp32, detached); gradients are computed
    in the forward pass (three products). Without: log-probabilities [t] fp32, differentiable (four products).
    return_entropy: one more result, the entropy of each row's softmax in nats, [t] fp32, detached.
    The gradient of hidden is this rank's part: the sum over the group is the caller's. For bf16 inputs the logits are a
    bf16 product, with fp32_logits one that is not rounded; the statistics are fp32; the weight's gradient is summed in
    fp32 and returned in weight.dtype. chunk_tokens: rows whose logits are held at a time, by default 512.
    Errors: shapes that do not agree, labels outside the vocabulary.
    """
    check_inputs(hidden, labels, vocab_size)
    group = group if group is not None and dist.get_world_size(group) > 1 else None
    settings = _Settings(
        Shard.of(weight, vocab_size, group), logits_divisor, chunk_tokens or CHUNK_TOKENS, return_entropy, fp32_logits
    )
    if token_weights is None:
        logprobs, entropy = _LogProbs.apply(hidden, weight, labels, settings)
        return (logprobs, entropy) if return_entropy else logprobs
    loss, logprobs, entropy = _WeightedLoss.apply(hidden, weight, labels, token_weights, settings)
    return (loss, logprobs, entropy) if return_entropy else (loss, logprobs)


def check_inputs(hidden: Tensor, labels: Tensor, vocab_size: int) -> None:
    """Labels are compared with the vocabulary on a CPU only: elsewhere that would wait for the device."""
    if hidden.shape[0] != labels.shape[0]:
        raise ValueError(f"linear_cross_entropy: {hidden.shape[0]} rows in hidden, {labels.shape[0]} labels")
    if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < vocab_size:
        raise ValueError(
            f"linear_cross_entropy: labels run from {int(labels.min())} to {int(labels.max())}, "
            f"the vocabulary from 0 to {vocab_size - 1}"
        )


class Shard(NamedTuple):
    """Which tokens of the vocabulary this rank holds: [first, first + rows)."""

    first: int
    rows: int
    group: dist.ProcessGroup | None

    @staticmethod
    def of(weight: Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> "Shard":
        first = len(weight) * (dist.get_rank(group) if group is not None else 0)
        return Shard(first, max(0, min(len(weight), vocab_size - first)), group)

    def find(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each label's local row (some row where it is not ours), and whether it is ours."""
        local = labels - self.first
        return local.clamp(0, max(0, self.rows - 1)), (local >= 0) & (local < self.rows)


class _Settings(NamedTuple):
    shard: Shard
    divisor: float
    chunk_tokens: int
    entropy: bool
    fp32_logits: bool

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[n, d] x [v, d] -> [n, v], in the inputs' dtype or unrounded."""
        rows = weight[: self.shard.rows]
        if not self.fp32_logits or hidden.dtype.itemsize >= 4:
            return mm(hidden, rows.t())
        wide = hidden.float()  # exact products of bf16 numbers; the weight is widened in blocks
        return torch.cat([mm(wide, block.float().t()) for block in rows.split(CHUNK_ROWS)], 1)


def chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))


class _Parts(NamedTuple):
    """What a row's softmax over the whole vocabulary is made of, each [n] in nats, after the divisor."""

    highest: Tensor  # of the local logits
    lse: Tensor  # log-sum-exp
    target: Tensor  # the label's logit
    entropy: Tensor | None


def _log_softmax_parts(logits: Tensor, labels: Tensor, settings: _Settings, keep: bool) -> _Parts:
    """Where `keep`, the logits become exp((logit - local row maximum) / divisor), in place."""
    acc, shard, divisor = accumulate_dtype(logits.dtype), settings.shard, settings.divisor
    if shard.rows:
        local, ours = shard.find(labels)
        target = torch.where(ours, logits.gather(1, local[:, None])[:, 0], 0).to(acc) / divisor
        highest, sums, weighted = _exponentials(logits, None, divisor, keep, settings.entropy)
        lse, mean = sums.log() + highest / divisor, weighted / sums + highest / divisor
    else:
        target = mean = logits.new_zeros(len(labels), dtype=acc)
        highest = lse = torch.full_like(target, -torch.inf)
    if shard.group is not None:
        lse, target, mean = join_shards(torch.stack([lse, target, mean]), shard.group)
    return _Parts(highest / divisor, lse, target, lse - mean if settings.entropy else None)


def join_shards(mine: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's (log-sum-exp, label's logit or 0, mean logit under its softmax) [3, n] -> the whole vocabulary's."""
    every = mine.new_empty(dist.get_world_size(group), *mine.shape)
    dist.all_gather_into_tensor(every.flatten(0, 1), mine, group=group)
    lse = every[:, 0].logsumexp(0)
    return lse, every[:, 1].sum(0), ((every[:, 0] - lse).exp() * every[:, 2]).sum(0)


def _exponentials(
    logits: Tensor, base: Tensor | None, divisor: float, keep: bool, entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(base, sums of e, sums of e x where `entropy`), each [n], of x = (logits - base) / divisor and e = exp(x).

    base is the row maximum where None. Where `keep`, the exponentials take the logits' place.
    """
    sums = torch.empty(len(logits), dtype=accumulate_dtype(logits.dtype), device=logits.device)
    weighted = torch.zeros_like(sums)
    highest = torch.empty_like(sums) if base is None else base
    for rows in chunks(len(logits), ROWS):
        block = logits[rows]
        wide = block.to(sums.dtype)  # the block itself in fp32 and fp64
        if base is None:
            torch.amax(wide, 1, out=highest[rows])
        shift = highest[rows, None] * (-LOG2_E / divisor)
        torch.add(shift, wide, alpha=LOG2_E / divisor, out=wide)
        exponents = wide.clone() if entropy else None
        torch.sum(wide.exp2_(), 1, out=sums[rows])
        if exponents is not None:
            torch.sum(exponents.mul_(wide), 1, out=weighted[rows]).div_(LOG2_E)
        if keep and wide is not block:
            block.copy_(wide)
    return highest, sums, weighted


class _Gradients:
    """Sums the gradients chunk by chunk; grad_logits = coefficient * (softmax - onehot)."""

    def __init__(self, hidden: Tensor, weight: Tensor, shard: Shard, wanted: tuple[bool, bool]) -> None:
        self.inputs, self.shard = (hidden, weight[: shard.rows]), shard
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        acc = accumulate_dtype(hidden.dtype)
        self.weight = torch.zeros_like(weight, dtype=acc) if wanted[1] else None

    def add(self, part: slice, labels: Tensor, exponentials: Tensor, scale: Tensor, coefficient: Tensor) -> None:
        """scale * exponentials [n, v] = coefficient * softmax; both factors are [n, 1] in the accumulation dtype."""
        hidden, rows = self.inputs[0][part], self.inputs[1]
        exponentials = exponentials.to(rows.dtype)  # of unrounded logits
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
    for rows in chunks(len(part), 1024):
        total[rows] += part[rows].to(total.dtype)


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, token_weights, settings):
        wanted = ctx.needs_input_grad[:2]
        gradients = _Gradients(hidden, weight, settings.shard, wanted)
        logprobs = torch.empty(len(labels), dtype=accumulate_dtype(hidden.dtype), device=hidden.device)
        entropy = torch.empty_like(logprobs) if settings.entropy else None
        token_weights = token_weights.to(logprobs.dtype)
        for part in chunks(len(labels), settings.chunk_tokens):
            logits = settings.logits(hidden[part], weight)
            parts = _log_softmax_parts(logits, labels[part], settings, keep=any(wanted))
            logprobs[part] = parts.target - parts.lse
            if entropy is not None:
                entropy[part] = parts.entropy
            if any(wanted):
                coefficient = token_weights[part, None] / settings.divisor
                scale = coefficient * (parts.highest - parts.lse).exp()[:, None]
                gradients.add(part, labels[part], logits, scale, coefficient)
        ctx.gradients = gradients.result(weight)
        ctx.mark_non_differentiable(*(x for x in (logprobs, entropy) if x is not None))
        return -(logprobs * token_weights).sum(), logprobs, entropy

    @staticmethod
    def backward(ctx, grad_loss, *_):
        scaled = (None if g is None else g * grad_loss.to(g.dtype) for g in ctx.gradients)
        return *scaled, *(None,) * 3


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, settings):
        lse = torch.empty(len(labels), dtype=accumulate_dtype(hidden.dtype), device=hidden.device)
        logprobs = torch.empty_like(lse)
        entropy = torch.empty_like(lse) if settings.entropy else None
        for part in chunks(len(labels), settings.chunk_tokens):
            logits = settings.logits(hidden[part], weight)
            parts = _log_softmax_parts(logits, labels[part], settings, keep=False)
            lse[part], logprobs[part] = parts.lse, parts.target - parts.lse
            if entropy is not None:
                entropy[part] = parts.entropy
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.settings = settings
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, _):
        hidden, weight, labels, lse = ctx.saved_tensors
        settings = ctx.settings
        gradients = _Gradients(hidden, weight, settings.shard, ctx.needs_input_grad[:2])
        for part in chunks(len(labels), settings.chunk_tokens):
            logits = settings.logits(hidden[part], weight)
            _exponentials(logits, lse[part] * settings.divisor, settings.divisor, keep=True)
            coefficient = -grad_logprobs[part, None] / settings.divisor
            gradients.add(part, labels[part], logits, coefficient, coefficient)
        return *gradients.result(weight), *(None,) * 2


def lm_logits(hidden: Tensor, weight: Tensor, divisor: float) -> Tensor:
    """hidden [n, d], weight [v, d] -> hidden @ weight.T / divisor, [n, v] fp32: never rounded to a narrower dtype.

    No autograd. On a CPU a bf16 weight is widened in blocks, as in `linear_cross_entropy(fp32_logits=True)`.
    """
    acc = accumulate_dtype(hidden.dtype)
    if hidden.dtype == acc:
        logits = mm(hidden, weight.t())
    elif hidden.device.type == "cuda":
        logits = torch.mm(hidden, weight.t(), out_dtype=acc)
    else:
        wide = hidden.to(acc)
        logits = torch.cat([mm(wide, block.to(acc).t()) for block in weight.split(CHUNK_ROWS)], 1)
    return logits if divisor == 1 else logits.div_(divisor)
