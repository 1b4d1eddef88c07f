"""AdamW in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor | None],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
) -> None:
    """One step of AdamW (arXiv 1711.05101, as torch.optim.AdamW), in place; copies receive the new parameters rounded.

    params, exp_avgs, exp_avg_sqs: n fp32 tensors; grads: n of fp32, bf16 or fp16, multiplied by grad_scale (clipping);
    copies: n tensors of the model's dtype or Nones. step counts from 1.
    """
    corrections = [1 - beta**step for beta in betas]
    for param, grad, exp_avg, exp_avg_sq, copy in zip(params, grads, exp_avgs, exp_avg_sqs, copies, strict=True):
        grad = grad.to(param.dtype) * grad_scale
        exp_avg.lerp_(grad, 1 - betas[0])
        exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
        root = exp_avg_sq.sqrt().div_(corrections[1] ** 0.5).add_(eps)
        param.mul_(1 - lr * weight_decay).addcdiv_(exp_avg, root, value=-lr / corrections[0])
        if copy is not None:
            copy.copy_(param)
