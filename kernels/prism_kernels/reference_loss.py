"""Vocabulary-parallel cross entropy fused with the output projection; never holds the logits of the whole batch."""

# t packed tokens, d hidden, v vocabulary (local rows that are real tokens)

import torch
import torch.distributed as dist
from torch import Tensor

from prism_kernels.precision import accumulate_dtype


def _local_rows(weight: Tensor, vocab_size: int, group) -> tuple[Tensor, int]:
    """This rank's rows of the weight without padding, and the token id of its first row."""
    first = weight.shape[0] * (dist.get_rank(group) if group is not None else 0)
    return weight[: max(0, min(weight.shape[0], vocab_size - first))], first


def _chunk_logits(hidden: Tensor, rows: Tensor, divisor: float, acc: torch.dtype) -> Tensor:
    return (hidden @ rows.t()).to(acc).div_(divisor)


def _statistics(logits: Tensor, labels: Tensor, first: int, group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-sum-exp over the whole vocabulary, the label's logit, label's local row, is it ours), each [n]."""
    local = labels - first
    ours = (local >= 0) & (local < logits.shape[1])
    local = local.clamp(0, max(0, logits.shape[1] - 1))
    if logits.shape[1]:
        lse = logits.logsumexp(1)
        target = torch.where(ours, logits.gather(1, local[:, None])[:, 0], 0)
    else:
        lse, target = logits.new_full((len(labels),), -torch.inf), logits.new_zeros(len(labels))
    if group is not None:
        mine = torch.stack([lse, target])
        every = mine.new_empty(dist.get_world_size(group) * 2, len(labels))  # gloo gathers along the first axis
        dist.all_gather_into_tensor(every, mine, group=group)
        lse, target = every[0::2].logsumexp(0), every[1::2].sum(0)
    return lse, target, local, ours


def _logit_gradient(logits: Tensor, lse: Tensor, scale: Tensor, local: Tensor, ours: Tensor) -> Tensor:
    """scale * (softmax - onehot), in place of the logits."""
    grad = logits.sub_(lse[:, None]).exp_().mul_(scale[:, None])
    if grad.shape[1]:
        grad.scatter_add_(1, local[:, None], torch.where(ours, -scale, 0)[:, None])
    return grad


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, token_weights, divisor, vocab_size, group, chunk_tokens):
        acc = accumulate_dtype(hidden.dtype)
        rows, first = _local_rows(weight, vocab_size, group)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=acc) if need_weight else None
        logprobs = torch.empty(len(labels), dtype=acc, device=hidden.device)
        for part in torch.arange(len(labels), device=labels.device).split(chunk_tokens):
            part = slice(int(part[0]), int(part[-1]) + 1)
            logits = _chunk_logits(hidden[part], rows, divisor, acc)
            lse, target, local, ours = _statistics(logits, labels[part], first, group)
            logprobs[part] = target - lse
            if not (need_hidden or need_weight):
                continue
            scale = token_weights[part].to(acc) / divisor
            grad = _logit_gradient(logits, lse, scale, local, ours).to(hidden.dtype)
            if need_hidden:
                torch.mm(grad, rows, out=grad_hidden[part])
            if need_weight:
                grad_weight[: len(rows)] += grad.t() @ hidden[part]
        ctx.grads = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.mark_non_differentiable(logprobs)
        return -(logprobs * token_weights).sum(), logprobs

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_hidden, grad_weight = (None if g is None else g * grad_loss.to(g.dtype) for g in ctx.grads)
        return grad_hidden, grad_weight, None, None, None, None, None, None


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, divisor, vocab_size, group, chunk_tokens):
        acc = accumulate_dtype(hidden.dtype)
        rows, first = _local_rows(weight, vocab_size, group)
        lses, logprobs = [], []
        for h, y in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True):
            lse, target, _, _ = _statistics(_chunk_logits(h, rows, divisor, acc), y, first, group)
            lses.append(lse)
            logprobs.append(target - lse)
        ctx.save_for_backward(hidden, weight, labels, torch.cat(lses))
        ctx.settings = divisor, vocab_size, group, chunk_tokens
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx, grad_logprobs):
        hidden, weight, labels, lse = ctx.saved_tensors
        divisor, vocab_size, group, chunk_tokens = ctx.settings
        rows, first = _local_rows(weight, vocab_size, group)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=lse.dtype)
        for start in range(0, len(labels), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = _chunk_logits(hidden[part], rows, divisor, lse.dtype)
            local = labels[part] - first
            ours = (local >= 0) & (local < len(rows))
            local = local.clamp(0, max(0, len(rows) - 1))
            grad = _logit_gradient(logits, lse[part], -grad_logprobs[part] / divisor, local, ours).to(hidden.dtype)
            torch.mm(grad, rows, out=grad_hidden[part])
            grad_weight[: len(rows)] += grad.t() @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


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

    hidden: [t, d], weight: [v_local, d], labels: [t] int64 in [0, vocab_size). Over a process `group`, rank r holds rows
    [r * v_local, (r + 1) * v_local) of the vocabulary; rows >= vocab_size are padding and never enter the softmax.
    With token_weights [t]: (sum of token_weights * nll, log-probabilities [t] fp32, detached); gradients are computed in
    the forward pass (three products). Without: log-probabilities [t] fp32, differentiable (four products).
    The gradient of hidden is this rank's part: the sum over the group is the caller's. For bf16 inputs the logits are a
    bf16 product, the statistics fp32; the weight's gradient is summed in fp32 and returned in weight.dtype.
    """
    if hidden.shape[0] != labels.shape[0]:
        raise ValueError(f"linear_cross_entropy: {hidden.shape[0]} hidden rows, {labels.shape[0]} labels")
    group = group if group is not None and dist.get_world_size(group) > 1 else None
    if token_weights is None:
        return _LogProbs.apply(hidden, weight, labels, logits_divisor, vocab_size, group, chunk_tokens)
    return _FusedLoss.apply(hidden, weight, labels, token_weights, logits_divisor, vocab_size, group, chunk_tokens)
