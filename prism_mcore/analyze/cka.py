"""Linear CKA: how alike two models see the same prompts, whatever the axes and the scale of their hidden states.

With X [n, d] of one model and Y [n, e] of another, columns centred: ||Y'X||^2 / (||X'X|| ||Y'Y||) in Frobenius norms
(Kornblith et al. 2019, arXiv 1905.00414, eq. 7). It is 1 where Y is a rotation and a multiple of X. From n < d prompts
even unrelated models get well above 0, so that a value needs its noise floor: that of two seeds.
"""

# n prompts, l layers, m prompts of a draw

from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95


@dataclass(frozen=True)
class Similarity:
    """`Similarity(0.9993, 0.9991, 0.9995, 0.9994)`: of one layer of two models on one set of prompts."""

    cka: float
    low: float  # 95% interval: what as many other prompts would give
    high: float
    mean_of_halves: float  # over draws of half of the prompts: what PRISM reports


def gram(states: Tensor) -> Tensor:
    """Hidden states [n, l, d] -> products of every two prompts' [l, n, n] fp64, centred over prompts."""
    x = states.double().transpose(0, 1)
    x = x - x.mean(1, keepdim=True)
    return x @ x.mT


def cka(first: Tensor, second: Tensor) -> Tensor:
    """Products [..., n, n] of two models -> [...]; nan where all prompts are one to a model."""
    first, second = _centred(first), _centred(second)
    product = (first * second).sum((-2, -1))
    return product / (first.square().sum((-2, -1)) * second.square().sum((-2, -1))).sqrt()


def _centred(products: Tensor) -> Tensor:
    rows = products.mean(-1, keepdim=True)
    return products - rows - rows.mT + rows.mean(-2, keepdim=True)


def similarities(first: Tensor, second: Tensor, *, draws: int, seed: int) -> list[Similarity]:
    """Products [l, n, n] of two models, layer by layer, with an interval over prompts.

    Each draw takes half of the prompts, none twice: its variance is then that of the whole (a bootstrap's doubles are
    alike by construction, and would raise CKA). A half's CKA is higher than the whole's on average, so the interval is
    the draws' spread around their mean, put around the value.
    """
    values, count = cka(first, second), first.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    taken = [torch.randperm(count, generator=generator)[: count // 2] for _ in range(draws)]
    drawn = torch.stack([cka(_of(first, some), _of(second, some)) for some in taken])
    means = drawn.mean(0)
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = (values + torch.quantile(drawn - means, edges, dim=0)).clamp(0.0, 1.0)
    rows = zip(values.tolist(), low.tolist(), high.tolist(), means.tolist(), strict=True)
    return [Similarity(*row) for row in rows]


def _of(products: Tensor, prompts: Tensor) -> Tensor:
    return products[:, prompts][:, :, prompts]
