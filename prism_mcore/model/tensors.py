"""Tensors of the parameter table: drawn, cut over tensor-parallel ranks, and put together again."""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from prism_mcore.model.parameters import Parameter


def draw(name: str, parameter: Parameter, seed: int) -> Tensor:
    """The initial value of the whole tensor, fp32 on the CPU: a pure function of (seed, name), for any layout."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return _INITIAL[parameter.initial.kind](parameter.shape, generator, *parameter.initial.numbers)


def shard(whole: Tensor, parameter: Parameter, rank: int, tp: int) -> Tensor:
    """The slice of the whole tensor that tensor-parallel rank `rank` of `tp` holds; vocabulary padded with zeros."""
    if parameter.vocabulary and whole.shape[0] % tp:
        padding = whole.new_zeros(tp - whole.shape[0] % tp, *whole.shape[1:])
        whole = torch.cat([whole, padding])
    if parameter.tp_axis is None or tp == 1:
        return whole
    axis = parameter.tp_axis
    parts = whole.split(parameter.parts or (whole.shape[axis],), dim=axis)
    return torch.cat([part.chunk(tp, dim=axis)[rank] for part in parts], dim=axis)


def gather(shards: list[Tensor], parameter: Parameter) -> Tensor:
    """The whole tensor from all tensor-parallel ranks' slices, vocabulary padding removed; the inverse of `shard`."""
    if parameter.tp_axis is None or len(shards) == 1:
        whole = shards[0]
    else:
        axis, tp = parameter.tp_axis, len(shards)
        sizes = [size // tp for size in parameter.parts] or [shards[0].shape[axis]]
        by_part = zip(*(piece.split(sizes, dim=axis) for piece in shards), strict=True)
        whole = torch.cat([torch.cat(pieces, dim=axis) for pieces in by_part], dim=axis)
    return whole[: parameter.shape[0]] if parameter.vocabulary else whole


def _ones(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.ones(shape)


def _zeros(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.zeros(shape)


def _normal(shape: tuple[int, ...], generator: torch.Generator, std: float) -> Tensor:
    return torch.randn(shape, generator=generator).mul_(std)


def _uniform(shape: tuple[int, ...], generator: torch.Generator, bound: float) -> Tensor:
    return torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound)


def _a_log(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.arange(1, shape[0] + 1, dtype=torch.float32).log_()  # Mamba-2: A = -1, -2, ... -heads


def _dt_bias(shape: tuple[int, ...], generator: torch.Generator, least: float, most: float, floor: float) -> Tensor:
    # Mamba-2: softplus(dt_bias) is log-uniform in [dt_min, dt_max].
    low, high = math.log(least), math.log(most)
    dt = (torch.rand(shape, generator=generator) * (high - low) + low).exp_().clamp_(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


_INITIAL: dict[str, Callable[..., Tensor]] = {
    "ones": _ones,
    "zeros": _zeros,
    "normal": _normal,
    "uniform": _uniform,
    "a_log": _a_log,
    "dt_bias": _dt_bias,
}
