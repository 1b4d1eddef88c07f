"""Documents of one micro-batch that continue the same prefix: a group's responses after the prompt, computed once.

Every product, norm and activation acts on single tokens, so a prefix costs them nothing more for the second response.
What reaches back in a document starts from the prefix: a convolution and a scan from the states at its end, attention
from its keys and values. Gradients of the prefix are the sum over its continuations, by autograd.
"""

# t packed tokens, s of them in prefixes and whole documents, h query heads, hk key heads, p head_dim, c channels

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from prism_kernels.boundaries import Boundaries, copied
from prism_kernels.scan.inputs import ScanInputs

Attend = Callable[[Tensor, Tensor, Tensor, Boundaries], Tensor]  # q, k, v, their documents


@dataclass(frozen=True, eq=False)
class SharedPrefixes:
    """Rows [:s] hold documents that continue nothing, the rest those that each continue the end of one of them.

    A prompt of 3 tokens with continuations of 2 and 4, and a document of 5 of its own:
        SharedPrefixes(whole=Boundaries([0, 3, 8]), continuations=Boundaries([0, 2, 6]), parents=[0, 0])
    """

    whole: Boundaries
    continuations: Boundaries
    parents: np.ndarray  # [continuations] int64: the document of `whole` that each continues

    @staticmethod
    def of(device: torch.device, cu_seqlens: Tensor, parents: Tensor) -> "SharedPrefixes":
        """parents [documents] on the CPU, as in `PackedBatch`: -1 for those that continue nothing, which come first."""
        count = int((parents < 0).sum())
        ends, rest = cu_seqlens[: count + 1], cu_seqlens[count:]
        return SharedPrefixes(
            Boundaries.on(device, ends), Boundaries.on(device, rest - rest[0]), parents[count:].numpy().astype(np.int64)
        )

    def convolution(self, conv: Callable, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`causal_conv1d` of x [t, c]."""
        s = self.whole.num_tokens
        before, states = conv(x[:s], weight, bias, self.whole, return_final_state=True)
        after = conv(x[s:], weight, bias, self.continuations, initial_state=states.index_select(0, self._parent_rows))
        return torch.cat([before, after])

    def scan(self, scan: Callable, inputs: ScanInputs, chunk_len: int) -> Tensor:
        """`ssd_scan` [t, h, p]."""
        s = self.whole.num_tokens
        first, rest = (
            replace(inputs, **{name: getattr(inputs, name)[rows] for name in ("x", "dt", "B", "C")})
            for rows in (slice(0, s), slice(s, None))
        )
        before, states = scan(first, self.whole, chunk_len, return_final_states=True)
        initial = states.index_select(0, self._parent_rows)
        return torch.cat([before, scan(rest, self.continuations, chunk_len, initial_state=initial)])

    def attention(
        self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, window: int | None = None, recomputed: bool = False
    ) -> Tensor:
        """q [t, h, p], k and v [t, hk, p] -> [t, h, p].

        Each continuation's rows are laid out after copies of its prefix's; the copies' results are dropped. `attend`
        knows the window, and nothing more is kept for backward than what it keeps.
        """
        s = self.whole.num_tokens
        before = attend(q[:s], k[:s], v[:s], self.whole)
        rows, own, joined = self._joined
        q, k, v = (x.index_select(0, rows) for x in (q, k, v))
        after = attend(q, k, v, joined)
        return torch.cat([before.flatten(1), after.flatten(1).index_select(0, own)])

    @cached_property
    def _parent_rows(self) -> Tensor:
        return copied(torch.from_numpy(self.parents), self.whole.cu_seqlens.device)

    @cached_property
    def _joined(self) -> tuple[Tensor, Tensor, Boundaries]:
        """Rows of the t for every continuation behind its prefix, which of those are its own, and where each ends."""
        rows, own, ends = [], [], [0]
        for (start, end), parent in zip(_spans(self.continuations), self.parents, strict=True):
            first, last = self.whole.offsets[parent], self.whole.offsets[parent + 1]
            rows += [np.arange(first, last), np.arange(start, end) + self.whole.num_tokens]
            own.append(np.arange(end - start) + ends[-1] + last - first)
            ends.append(ends[-1] + last - first + end - start)
        device = self.whole.cu_seqlens.device
        tables = (copied(torch.from_numpy(np.concatenate(table)), device) for table in (rows, own))
        return *tables, Boundaries.on(device, torch.tensor(ends, dtype=torch.int32))


def _spans(boundaries: Boundaries) -> list[tuple[int, int]]:
    return list(zip(boundaries.offsets, boundaries.offsets[1:], strict=False))
