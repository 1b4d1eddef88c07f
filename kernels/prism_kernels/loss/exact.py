"""Log-probabilities of tokens with the same bits in training and at sampling: both call what is here.

The logits are products that are not rounded (bf16 weights are widened), divided once, by divisor * temperature; the
log-probability is (logit - highest) - log(sum of exp(logit - highest)). Over tensor-parallel ranks the highest is exact
in any order, and the ranks' sums are added in rank order.
"""

# t packed tokens, n rows at a time, d hidden, v vocabulary (local rows that are real tokens)

import torch
import torch.distributed as dist
from torch import Tensor

from prism_kernels.linear.exact import mm, sum_over_ranks
from prism_kernels.loss import reference
from prism_kernels.loss.reference import CHUNK_ROWS, CHUNK_TOKENS, ROWS, Shard
from prism_kernels.precision import accumulate_dtype


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
    fp32_logits: bool = True,
) -> Tensor | tuple[Tensor, ...]:
    """`reference.linear_cross_entropy`: hidden [t, d], weight [v_local, d], labels [t]; logits never rounded.

    A log-probability is what `token_logprobs(lm_logits(...))` gives the sampler. Both forms take four products.
    """
    reference.check_inputs(hidden, labels, vocab_size)
    group = group if group is not None and dist.get_world_size(group) > 1 else None
    shard = Shard.of(weight, vocab_size, group)
    settings = reference._Settings(shard, logits_divisor, chunk_tokens or CHUNK_TOKENS, return_entropy, True)
    logprobs, entropy = _LogProbs.apply(hidden, weight, labels, settings)
    if token_weights is None:
        return (logprobs, entropy) if return_entropy else logprobs
    loss = -(logprobs * token_weights.to(logprobs.dtype)).sum()
    return (loss, logprobs.detach(), entropy) if return_entropy else (loss, logprobs.detach())


def lm_logits(hidden: Tensor, weight: Tensor, divisor: float) -> Tensor:
    """hidden [n, d], weight [v, d] -> hidden @ weight.T / divisor, [n, v] fp32; no autograd.

    divisor: the model's logits divisor times the temperature, in one division as in training.
    """
    acc = accumulate_dtype(hidden.dtype)
    wide = hidden.to(acc)
    blocks = [weight] if weight.dtype == acc else weight.split(CHUNK_ROWS)
    parts = [mm(wide, block.to(acc).t()) for block in blocks]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).div_(divisor)


def token_logprobs(logits: Tensor, tokens: Tensor, first: int = 0, group: dist.ProcessGroup | None = None) -> Tensor:
    """log-softmax of logits [n, v] at tokens [n] int64 -> [n] fp32; no autograd.

    Over a process group, this rank's columns are the tokens from `first` on, without padding.
    """
    return _statistics(logits, tokens, Shard(first, logits.shape[1], group))[0]


def _statistics(logits: Tensor, tokens: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """(log-probability of each token, log-sum-exp of each row), both [n]."""
    highest = logits.amax(1) if shard.rows else logits.new_full((len(logits),), -torch.inf)
    local, ours = shard.find(tokens)
    target = logits.gather(1, local[:, None])[:, 0] if shard.rows else torch.zeros_like(highest)
    if shard.group is not None:
        every = highest.new_empty(dist.get_world_size(shard.group), len(highest))
        dist.all_gather_into_tensor(every.flatten(), highest, group=shard.group)
        highest = every.amax(0)
    sums = torch.empty_like(highest)
    for rows in reference.chunks(len(logits), ROWS):
        sums[rows] = _sums((logits[rows] - highest[rows, None]).exp_())
    sums = sum_over_ranks(sums, shard.group)
    target = sum_over_ranks(torch.where(ours, target, 0), shard.group)  # others add zeros
    return (target - highest) - sums.log(), highest + sums.log()


def _sums(rows: Tensor) -> Tensor:
    # torch cuts a single long row over threads.
    return rows.sum(1) if len(rows) > 1 else rows.expand(2, -1).sum(1)[:1]


class _LogProbs(reference._LogProbs):
    @staticmethod
    def forward(ctx, hidden, weight, labels, settings):
        lse = torch.empty(len(labels), dtype=accumulate_dtype(hidden.dtype), device=hidden.device)
        logprobs = torch.empty_like(lse)
        entropy = torch.empty_like(lse) if settings.entropy else None
        rows = weight[: settings.shard.rows]
        for part in reference.chunks(len(labels), settings.chunk_tokens):
            scaled = lm_logits(hidden[part], rows, settings.divisor)
            logprobs[part], lse[part] = _statistics(scaled, labels[part], settings.shard)
            if entropy is not None:
                mean = (scaled * (scaled - lse[part, None]).exp_()).sum(1)
                entropy[part] = lse[part] - sum_over_ranks(mean, settings.shard.group)
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.settings = settings
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy
