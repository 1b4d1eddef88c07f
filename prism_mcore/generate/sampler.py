"""From logits to tokens and their log-probabilities: the same tokens in any batch, on any slot, for any layout.

One uniform number per token comes from a counter, not from a generator's state. It is looked up in the cumulative
distribution over the vocabulary in its own order, in two steps: among totals of tiles of tokens, which are gathered
over tensor-parallel ranks, then within the one tile, on the rank that holds it.
"""

# n rows, v vocabulary (local tokens of this rank), T tiles

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from prism_kernels.precision import LOG2_E
from prism_mcore.parallel import Groups

TILE = 128  # tokens
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
PHILOX_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
WORD = np.uint64(0xFFFFFFFF)
HALF_WORD = np.uint64(32)


def uniforms(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in (0, 1) for each (seed, step, prompt, sample) of keys [n, 4] and position [n]; float64 [n].

    Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the seed as its key and
    (position, sample, prompt, step) as its counter; two of its four words make 52 bits. A prompt's, step's or sample's
    number beyond 32 bits counts modulo 2**32.
    """
    seed, step, prompt, sample = (column.astype(np.uint64) for column in keys.T)
    counter = [np.asarray(x).astype(np.uint64) & WORD for x in (positions, sample, prompt, step)]
    key = [seed & WORD, seed >> HALF_WORD]
    for _ in range(PHILOX_ROUNDS):
        low, high = (m * x for m, x in zip(PHILOX_MULTIPLIERS, counter[::2], strict=True))
        counter = [
            (high >> HALF_WORD) ^ counter[1] ^ key[0],
            high & WORD,
            (low >> HALF_WORD) ^ counter[3] ^ key[1],
            low & WORD,
        ]
        key = [(k + weyl) & WORD for k, weyl in zip(key, PHILOX_WEYL, strict=True)]
    bits = ((counter[0] >> np.uint64(6)) << np.uint64(26)) | (counter[1] >> np.uint64(6))
    return (bits.astype(np.float64) + 0.5) / 2.0**52


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that this rank has logits of: [first, first + rows) of `size`, in tiles that start at its first."""

    size: int
    first: int
    rows: int
    tiles: int  # of each rank
    tp: dist.ProcessGroup | None  # None where this rank has all of them

    @staticmethod
    def of(size: int, padded: int, groups: Groups) -> "Vocabulary":
        """padded: rows of the output layer over all ranks."""
        each = padded // groups.tp_size
        first = each * groups.tp_rank
        tp = groups.tp if groups.tp_size > 1 else None
        return Vocabulary(size, first, max(0, min(each, size - first)), -(-each // TILE), tp)

    def gather(self, mine: Tensor) -> Tensor:
        """[n, k], the same k on every rank -> [n, ranks * k], in the order of the vocabulary."""
        if self.tp is None:
            return mine
        ranks = mine.new_empty(dist.get_world_size(self.tp), *mine.shape)
        dist.all_gather_into_tensor(ranks.flatten(0, 1), mine.contiguous(), group=self.tp)
        return ranks.transpose(0, 1).flatten(1)

    def reduce(self, mine: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.tp is not None:
            dist.all_reduce(mine, op, group=self.tp)
        return mine


# log-softmax of logits [n, v], whose columns start at token `first`, at tokens [n]; one is in prism_kernels.loss.exact
TokenLogprobs = Callable[[Tensor, Tensor, int, dist.ProcessGroup | None], Tensor]


@dataclass(frozen=True)
class Sampler:
    """Draws tokens from logits that are already divided by the temperature."""

    vocabulary: Vocabulary
    greedy: bool = False
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    token_logprobs: TokenLogprobs | None = None  # None: from the sums that drawing needs anyway

    def __call__(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """logits [n, v] fp32, uniform [n] fp64 -> tokens [n] int64 and their log-probs [n] fp32.

        A log-probability is that in the whole vocabulary, before top-k and top-p.
        """
        highest = self._highest(logits)
        weights, totals = self._exponentials(logits, highest)
        sums = totals.sum(1)
        if self.greedy:
            tokens, chosen = self._likeliest(logits, highest), highest
        else:
            if 0 < self.top_k < self.vocabulary.size or self.top_p < 1:
                weights[:, : self.vocabulary.rows].mul_(logits >= self._threshold(logits, highest)[:, None])
                totals = self._tile_totals(weights)
            tokens, chosen = self._draw(logits, weights, totals, uniform)
        if self.token_logprobs is not None:
            return tokens, self.token_logprobs(logits, tokens, self.vocabulary.first, self.vocabulary.tp)
        return tokens, ((chosen - highest).double() - sums.log()).float()

    def _highest(self, logits: Tensor) -> Tensor:
        mine = logits.amax(1) if logits.shape[1] else logits.new_full((len(logits),), -torch.inf)
        return self.vocabulary.reduce(mine, dist.ReduceOp.MAX)

    def _exponentials(self, logits: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
        """exp(logit - highest) [n, T * TILE], zeros beyond the vocabulary, and all ranks' tile totals."""
        here = self.vocabulary
        weights = logits.new_empty(len(logits), here.tiles * TILE)
        torch.sub(logits, highest[:, None], out=weights[:, : here.rows]).mul_(LOG2_E).exp2_()
        weights[:, here.rows :] = 0
        return weights, self._tile_totals(weights)

    def _tile_totals(self, weights: Tensor) -> Tensor:
        """[n, T * TILE] -> [n, ranks * T] fp64."""
        return self.vocabulary.gather(weights.unflatten(1, (-1, TILE)).sum(-1).double())

    def _likeliest(self, logits: Tensor, highest: Tensor) -> Tensor:
        """The first token with the highest logit."""
        here = self.vocabulary
        none = torch.full_like(highest, here.size, dtype=torch.int64)
        mine = torch.where(logits.amax(1) == highest, logits.argmax(1) + here.first, none) if here.rows else none
        return here.reduce(mine, dist.ReduceOp.MIN)

    def _threshold(self, logits: Tensor, highest: Tensor) -> Tensor:
        """[n]: the lowest logit that top-k, then top-p leave; ties with it stay."""
        here = self.vocabulary
        every = self._whole(logits)
        if 0 < self.top_k < here.size:
            likeliest = every.topk(self.top_k, dim=1).values
            if self.top_p == 1:
                return likeliest[:, -1]
            return _nucleus(likeliest, (likeliest - highest[:, None]).double().exp().sum(1), highest, self.top_p)[0]
        total = (every - highest[:, None]).exp().sum(1, dtype=torch.float64)
        threshold, enough = _nucleus(every.topk(min(NUCLEUS, here.size), dim=1).values, total, highest, self.top_p)
        if bool(enough.all()):
            return threshold
        return _nucleus(every.sort(1, descending=True).values, total, highest, self.top_p)[0]

    def _whole(self, logits: Tensor) -> Tensor:
        """[n, v] -> [n, the whole vocabulary]."""
        here = self.vocabulary
        if here.tp is None:
            return logits
        each = -(-here.size // dist.get_world_size(here.tp))
        padded = logits.new_full((len(logits), each), -torch.inf)
        padded[:, : here.rows] = logits
        return here.gather(padded)[:, : here.size]

    def _draw(self, logits: Tensor, weights: Tensor, totals: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [n] where the cumulative weights pass `uniform` of their sum, and their logits [n]."""
        here = self.vocabulary
        ends = _running_sums(totals)
        target = uniform * ends[:, -1]
        tile = _first_above(ends, target)
        before = torch.where(tile > 0, ends.gather(1, (tile - 1).clamp(min=0)[:, None])[:, 0], 0)
        rank = 0 if here.tp is None else dist.get_rank(here.tp)
        local = tile - rank * here.tiles
        ours = (local >= 0) & (local < here.tiles)
        local = local.clamp(0, here.tiles - 1)
        inside = weights.unflatten(1, (-1, TILE))[torch.arange(len(local), device=local.device), local]
        place = local * TILE + _first_above(_running_sums(inside.double()), target - before)
        chosen = self._logit(logits, place, ours)
        if here.tp is None:
            return place, chosen.float()
        found = torch.stack([torch.where(ours, place + here.first, 0).double(), chosen])
        tokens, chosen = here.reduce(found, dist.ReduceOp.SUM)
        return tokens.long(), chosen.float()

    def _logit(self, logits: Tensor, place: Tensor, ours: Tensor) -> Tensor:
        """logits [n, v] at the local columns `place` [n], 0 where they are another rank's; fp64."""
        if not self.vocabulary.rows:
            return torch.zeros_like(place, dtype=torch.float64)
        chosen = logits.gather(1, place.clamp(0, self.vocabulary.rows - 1)[:, None])[:, 0]
        return torch.where(ours, chosen, 0).double()


NUCLEUS = 512  # likeliest tokens that top-p looks among before it sorts the whole vocabulary


def _nucleus(falling: Tensor, total: Tensor, highest: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """falling logits [n, k] -> (the last logit that is needed to reach top_p of `total` [n], whether k were enough).

    A token stays where those before it have not reached top_p, as in transformers' TopPLogitsWarper.
    """
    reached = _running_sums((falling - highest[:, None]).double().exp()) / total[:, None]
    last = (reached < top_p).sum(1)
    return falling.gather(1, last.clamp(max=falling.shape[1] - 1)[:, None])[:, 0], last < falling.shape[1]


def _running_sums(x: Tensor) -> Tensor:
    """[n, k] -> the sum of each row up to each column; run.deterministic refuses torch.cumsum on a GPU."""
    if not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(1)
    reach = 1
    while reach < x.shape[1]:
        x = torch.cat([x[:, :reach], x[:, reach:] + x[:, :-reach]], 1)
        reach *= 2
    return x


def _first_above(ends: Tensor, target: Tensor) -> Tensor:
    """Index [n] of the first of rising ends [n, k] above target [n]; where none is, of the first that equals the last.

    So a weight of zero is never chosen.
    """
    target = torch.minimum(target, torch.nextafter(ends[:, -1], torch.zeros_like(target)))
    return (ends <= target[:, None]).sum(1).clamp(max=ends.shape[1] - 1)
