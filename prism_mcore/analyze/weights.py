"""What training did to the weights: how far, how many, in which direction; tensor by tensor, reading each file once.

A weight counts as changed by more than p where |new - old| > p |old|: by PRISM's definition (arXiv 2603.17074, §10), in
which tiny weights change easily. Beside it stand the share whose change is above 1% of its tensor's root mean square,
and the share of bf16 numbers that are the same to the bit: neighbouring ones are 0.4 to 0.8% apart, so that no weight
of a bf16 model can change by 0.1% alone. A share says little without a control: training of another kind with the same
steps and learning rates.
"""

# n numbers of a block

import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from prism_mcore.analyze.sources import Weights, require_same

THRESHOLDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
CHANGED = tuple(f"changed_{100 * p:g}pct" for p in THRESHOLDS)
COLUMNS = ("name", "module_class", "layer", "numel", "relative_l2", *CHANGED, "changed_rms_1pct", "identical_bf16")
READ = 2**22  # numbers of a tensor read at a time
BLOCK = 2**17  # worked on at a time: fp32 copies stay in the cache
GROUPS = {  # PRISM's modules; the rest of a Mamba sub-layer is its own kind
    "embedding": ("embed_tokens", "embeddings"),
    "head": ("lm_head",),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "input_linear", "output_linear"),
    "mamba": ("in_proj", "out_proj", "conv1d", "A_log", "D", "dt_bias"),
}


@dataclass
class Change:
    """Sums over elements of what one update did; of a tensor, a module or a model, for sums of these are sums."""

    numel: int = 0
    old: float = 0.0  # sum of squares of the old weights
    moved: float = 0.0  # of the differences
    changed: list[int] = field(default_factory=lambda: [0] * len(THRESHOLDS))
    changed_rms: int = 0
    identical: int = 0  # as bf16 numbers
    one_step: int = 0  # neighbours as bf16 numbers, of one sign

    def add(self, other: "Change") -> None:
        self.changed = [a + b for a, b in zip(self.changed, other.changed, strict=True)]
        for name in ("numel", "old", "moved", "changed_rms", "identical", "one_step"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def relative_l2(self) -> float:
        """||new - old|| / ||old||; infinite where all was zero."""
        if not self.moved:
            return 0.0
        return math.sqrt(self.moved / self.old) if self.old else math.inf

    def shares(self) -> dict[str, float]:
        """The columns from `relative_l2` on, and `one_step_bf16`."""
        counts = [*self.changed, self.changed_rms, self.identical, self.one_step]
        names = [*COLUMNS[4:], "one_step_bf16"]
        return dict(zip(names, [self.relative_l2, *(count / self.numel for count in counts)], strict=True))


@dataclass(frozen=True)
class TensorChange:
    """What each update did to one tensor, and the products of the updates, by pair."""

    name: str
    changes: tuple[Change, ...]  # of each new model
    products: dict[tuple[int, int], float]  # sum over elements of update i times update j

    @property
    def module_class(self) -> str:
        return module_class(self.name)

    @property
    def layer(self) -> int | None:
        return layer_of(self.name)

    def row(self, which: int = 0) -> dict[str, Any]:
        """One line of weights.csv."""
        change = self.changes[which]
        shares = {name: value for name, value in change.shares().items() if name in COLUMNS}
        place = {"name": self.name, "module_class": self.module_class, "layer": self.layer, "numel": change.numel}
        return place | shares


def module_class(name: str) -> str:
    """What a tensor is part of, in its source's words: `q_proj`, `conv1d`, `A_log`; every norm is `norm`.

    A bias is part of what it is added to.
    """
    parts = name.split(".")
    own = parts[-2] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts[-1]
    return "norm" if "norm" in own else own


def group_of(kind: str) -> str:
    """PRISM's module of a class: attention, mlp, mamba, embedding, head, norm or other."""
    return next((group for group, kinds in GROUPS.items() if kind in kinds), "norm" if kind == "norm" else "other")


def layer_of(name: str) -> int | None:
    """The number in `layers.12.`; None of a tensor outside of layers."""
    found = re.search(r"\blayers\.(\d+)\.", name)
    return int(found[1]) if found else None


def compare(
    old: Weights, new: Sequence[Weights], on_bytes: Callable[[int], None] = lambda size: None
) -> Iterator[TensorChange]:
    """What became of every tensor of `old` in each new model, in the order of the files.

    Memory is the largest tensor of `old` and, for each thread, a block of READ numbers of every new model. Raises
    ExchangeError where shapes or names differ.
    """
    require_same([old, *new])
    threads = max(1, min(8, os.cpu_count() or 1))
    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:  # else each starts a team
        for name in old.entries:
            yield _of_tensor(name, old, new, pool, on_bytes)


def _of_tensor(
    name: str, old: Weights, new: Sequence[Weights], pool: Executor, on_bytes: Callable[[int], None]
) -> TensorChange:
    entry = old.entries[name]
    rows = max(1, READ // max(1, math.prod(entry.shape[1:])))
    parts = [slice(start, min(start + rows, entry.shape[0])) for start in range(0, entry.shape[0], rows)]
    before = torch.empty(entry.shape, dtype=entry.torch_dtype)
    squares = pool.map(lambda part: _read(old, name, part, before), parts)
    rms = math.sqrt(math.fsum(squares) / max(1, before.numel()))
    on_bytes(before.nbytes)
    changes = [Change() for _ in new]
    products = dict.fromkeys(combinations(range(len(new)), 2), 0.0)
    for of_part, of_pairs, size in pool.map(lambda part: _part(new, name, part, before[part], rms), parts):
        for change, more in zip(changes, of_part, strict=True):
            change.add(more)
        for pair, product in of_pairs.items():
            products[pair] += product
        on_bytes(size)
    return TensorChange(name, tuple(changes), products)


def _read(old: Weights, name: str, part: slice, out: Tensor) -> float:
    """Fill these rows of `out`; the sum of their squares."""
    out[part] = old.rows(name, part.start, part.stop)
    return sum(_square(_scratch(0, block)) for block in out[part].flatten().split(BLOCK))


def _part(
    new: Sequence[Weights], name: str, part: slice, before: Tensor, rms: float
) -> tuple[list[Change], dict[tuple[int, int], float], int]:
    """The changes of each new model, the updates' products, and bytes read, of some rows of a tensor."""
    after = [model.rows(name, part.start, part.stop).flatten() for model in new]
    changes = [Change() for _ in new]
    products = dict.fromkeys(combinations(range(len(new)), 2), 0.0)
    for block, *others in zip(before.flatten().split(BLOCK), *(tensor.split(BLOCK) for tensor in after), strict=True):
        wide = _scratch(0, block)
        updates = []
        for change, other in zip(changes, others, strict=True):
            update = _measure(change, block, wide, other, rms)
            updates.append(None if update is None or not products else update.clone())
        for i, j in products:
            products[i, j] += _product(updates[i], updates[j])
    return changes, products, sum(tensor.nbytes for tensor in after)


_kept = threading.local()


def _scratch(which: int, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy of a block [n] in one of this thread's own buffers: pages of fresh ones cost more than the arithmetic."""
    buffers = _kept.__dict__.setdefault("buffers", {})
    if (which, dtype) not in buffers or len(buffers[which, dtype]) < len(like):
        buffers[which, dtype] = torch.empty(max(BLOCK, len(like)), dtype=dtype)
    return buffers[which, dtype][: len(like)].copy_(like)


def _measure(change: Change, before: Tensor, wide: Tensor, after: Tensor, rms: float) -> Tensor | None:
    """Add a block [n] to a change; the differences [n] fp32, in a buffer that is used again, None where there are none.

    wide: `before` in fp32.
    """
    change.numel += len(wide)
    change.old += _square(wide)
    if before.dtype == after.dtype and torch.equal(before, after):
        change.identical += len(wide)
        return None
    flags = _scratch(1, wide)  # comparisons as 0.0 and 1.0: six times as fast as booleans and their sums
    old, new = (_scratch(number, x, torch.bfloat16) for number, x in ((0, before), (1, after)))
    change.identical += _count(torch.eq(_scratch(2, old), _scratch(3, new), out=flags))
    steps = _scratch(2, torch.sub(old.view(torch.int16), new.view(torch.int16), out=old.view(torch.int16)))
    change.one_step += _count(torch.eq(steps.abs_(), 1, out=flags))
    difference = _scratch(2, after).sub_(wide)
    change.moved += _square(difference)
    size = torch.abs(difference, out=_scratch(3, difference))
    change.changed_rms += _count(torch.gt(size, 0.01 * rms, out=flags))
    size.div_(wide).abs_()  # of a zero that stays: nan, which is above nothing; of one that moved: infinite
    for number, threshold in enumerate(THRESHOLDS):
        change.changed[number] += _count(torch.gt(size, threshold, out=flags))
    return difference


def _count(flags: Tensor) -> int:
    """How many of at most 2^24 are 1."""
    return int(flags.sum())


def _square(x: Tensor) -> float:
    return float(torch.dot(x, x))


def _product(a: Tensor | None, b: Tensor | None) -> float:
    return 0.0 if a is None or b is None else float(torch.dot(a, b))


# --- sums of tensors --------------------------------------------------------------------------------------------------


def by_class(tensors: Sequence[TensorChange], which: int = 0) -> list[dict[str, Any]]:
    """A line for each module class, each of PRISM's modules, each layer, and the whole.

    Both ways to sum: `pooled` counts every number alike, `mean` every tensor.
    """
    sums: dict[tuple[str, str], list[Change]] = {}
    for tensor in tensors:
        kind, layer = tensor.module_class, tensor.layer
        places = [("total", "total"), ("class", kind), ("module", group_of(kind))]
        places += [] if layer is None else [("layer", str(layer))]
        for place in places:
            sums.setdefault(place, []).append(tensor.changes[which])
    order = ["total", "module", "class", "layer"]
    lines: list[dict[str, Any]] = []
    for (level, name), changes in sorted(
        sums.items(), key=lambda item: (order.index(item[0][0]), _natural(item[0][1]))
    ):
        pooled = Change()
        for change in changes:
            pooled.add(change)
        shares = [change.shares() for change in changes]
        mean = {f"mean_{key}": math.fsum(share[key] for share in shares) / len(shares) for key in shares[0]}
        counted = {"level": level, "name": name, "tensors": len(changes), "numel": pooled.numel}
        lines.append(counted | {f"pooled_{key}": value for key, value in pooled.shares().items()} | mean)
    return lines


def cosines(tensors: Sequence[TensorChange]) -> list[dict[str, Any]]:
    """Of the updates to each pair of new models: pooled over all numbers, and the mean of tensors that both changed."""
    pairs = tensors[0].products if tensors else {}
    lines = []
    for i, j in pairs:
        moved = [(t.products[i, j], t.changes[i].moved, t.changes[j].moved) for t in tensors]
        each = [product / math.sqrt(a * b) for product, a, b in moved if a and b]
        product, a, b = (math.fsum(column) for column in zip(*moved, strict=True))
        pooled = product / math.sqrt(a * b) if a and b else math.nan
        mean = math.fsum(each) / len(each) if each else math.nan
        lines.append({"first": i, "second": j, "pooled": pooled, "mean": mean})
    return lines


def _natural(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdigit() else (-1, name)
