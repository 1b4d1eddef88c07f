"""What the Mamba-2 scan reads, one record for every backend and caller."""

# t packed tokens (of a decode step: one of each of b rows), h heads, p head_dim, g groups, n state

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from prism_kernels.boundaries import Boundaries
from prism_kernels.precision import accumulate_dtype


@dataclass(frozen=True, eq=False)
class ScanInputs:
    """The tensors of a scan, and the limit of its step sizes.

    Of Nemotron-H-8B on one rank: x [8192, 128, 64], dt [8192, 128], A_log, D and dt_bias [128], B and C [8192, 8, 128].

    y_i = C_i . S_i + D x_i with S_i = exp(-exp(A_log) step_i) S_(i - 1) + step_i x_i B_i, where step is
    softplus(dt + dt_bias) within dt_limit. Each h / g heads in a row share a group's B and C.
    """

    x: Tensor  # [t, h, p]
    dt: Tensor  # [t, h]
    A_log: Tensor  # [h], at least fp32, as D and dt_bias
    B: Tensor  # [t, g, n]
    C: Tensor  # [t, g, n]
    D: Tensor | None  # [h]
    dt_bias: Tensor  # [h]
    dt_limit: tuple[float, float] = (0.0, math.inf)

    def check(self, boundaries: Boundaries, chunk_len: int) -> None:
        """Raises ValueError where shapes, boundaries and chunk_len do not agree."""
        boundaries.check(x=self.x, dt=self.dt, B=self.B, C=self.C)
        heads, groups = self.x.shape[1], self.B.shape[1]
        if heads % groups:
            raise ValueError(f"ssd_scan: {heads} heads are not a multiple of {groups} groups")
        if chunk_len < 1:
            raise ValueError(f"chunk_len={chunk_len}; needs at least 1")

    def step_sizes(self) -> tuple[Tensor, Tensor]:
        """dt after bias, softplus and limit, and the log of each step's decay: both [t, h], in plain torch."""
        acc = accumulate_dtype(self.x.dtype)
        step = F.softplus(self.dt.to(acc) + self.dt_bias.to(acc))
        if tuple(self.dt_limit) != (0.0, math.inf):
            step = step.clamp(*self.dt_limit)
        return step, step * -self.A_log.to(acc).exp()
