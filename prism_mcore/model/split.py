"""Which sub-layers each pipeline chunk holds."""

from itertools import accumulate

from prism_mcore.model.flops import head_flops, sublayer_flops
from prism_mcore.model.spec import ModelSpec


def split_layers(spec: ModelSpec, pp: int, vpp: int, seq_len: int, split: str | list[int] = "auto") -> list[list[int]]:
    """Indices of the sub-layers of each of the pp*vpp pipeline chunks, in model order; chunk k is on stage k % pp.

    `auto` splits so that the slowest chunk, the head included in the last, takes as few FLOPs as possible, and among
    such splits takes the most even one. Otherwise `split` gives the number of sub-layers per chunk. Raises ValueError
    where the counts do not fit the model.
    """
    chunks, layers = pp * vpp, len(spec.pattern)
    if split == "auto":
        if layers < chunks:
            raise ValueError(f"{layers} sub-layers cannot fill pp*vpp={chunks} chunks; use at most {layers}")
        counts = _even_counts(_costs(spec, seq_len), chunks)
    else:
        counts = [int(count) for count in split]
        if len(counts) != chunks or sum(counts) != layers or min(counts) < 1:
            raise ValueError(f"split={counts} must be {chunks} numbers of at least 1 that sum to {layers}")
    ends = list(accumulate(counts))
    return [list(range(end - count, end)) for count, end in zip(counts, ends, strict=True)]


def _costs(spec: ModelSpec, seq_len: int) -> list[float]:
    """FLOPs of every sub-layer; the last one carries the head, with which it shares its chunk. Embedding costs none."""
    costs = [sublayer_flops(spec, kind, seq_len) for kind in spec.pattern]
    costs[-1] += head_flops(spec)
    return costs


def _even_counts(costs: list[float], chunks: int) -> list[int]:
    """Lengths of `chunks` non-empty runs of `costs` whose largest sum is least, then whose sum of squares is."""
    sums = [0.0, *accumulate(costs)]

    def best(key) -> tuple[float, list[int]]:
        """Dynamic programming over (runs, end): the least key of the first `end` costs in that many runs."""
        table: list[tuple[float, list[int]] | None] = [(0.0, [])] + [None] * len(costs)
        for _ in range(chunks):
            following: list[tuple[float, list[int]] | None] = [None] * (len(costs) + 1)
            for end in range(1, len(costs) + 1):
                for start in range(end):
                    before = table[start]
                    if before is None:
                        continue
                    value = key(before[0], sums[end] - sums[start])
                    known = following[end]
                    if value is not None and (known is None or value < known[0]):
                        following[end] = (value, [*before[1], end - start])
            table = following
        found = table[len(costs)]
        assert found is not None
        return found

    slowest, _ = best(max)
    limit = slowest * (1 + 1e-12)
    return best(lambda total, run: None if run > limit else total + run * run)[1]
