"""Where numbers lie in a tensor that is cut into boxes, and these into ranges: what any two cuts have in common."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

Shape = tuple[int, ...]


class Box(NamedTuple):
    """A rectangle of a tensor, whose numbers follow each other in a piece from `first` on, row by row."""

    offsets: Shape
    sizes: Shape
    first: int


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of a box of a tensor, the box flattened row by row.

    A rank's part of a tensor is a box (tensor parallelism cuts along one axis), and what its optimizer updates of that
    is a range (the distributed optimizer cuts flat buffers).
    """

    key: str
    shape: Shape  # of the whole tensor
    offsets: Shape  # of the box
    sizes: Shape
    start: int
    stop: int

    @staticmethod
    def of_box(key: str, shape: Shape, offsets: Shape, sizes: Shape) -> "Piece":
        """All of a box."""
        return Piece(key, shape, offsets, sizes, 0, math.prod(sizes))

    @property
    def count(self) -> int:
        """Elements."""
        return self.stop - self.start

    @property
    def name(self) -> str:
        """The same for no other piece of a checkpoint: what it is called in its file."""
        return f"{self.key}[{','.join(map(str, self.offsets))}]{self.start}:{self.stop}"

    @property
    def form(self) -> Shape:
        """Its shape as a tensor of its own."""
        return self.sizes if self.count == math.prod(self.sizes) else (self.count,)

    def boxes(self) -> Iterator[Box]:
        """The piece as rectangles of the whole tensor: 2 x axes - 1 at most."""
        first = 0
        for begin, sizes in _rectangles(self.sizes, self.start, self.stop):
            yield Box(tuple(o + b for o, b in zip(self.offsets, begin, strict=True)), sizes, first)
            first += math.prod(sizes)


def _rectangles(sizes: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """(begin, sizes) of the rectangles that a flat range of a box of these sizes consists of, in its order."""
    if start >= stop:
        return
    if len(sizes) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(sizes[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    cuts = (
        [(start // row, start, stop)] if first > last else [(first - 1, start, first * row), (last, last * row, stop)]
    )
    if first < last:
        cuts.insert(1, (first, first * row, last * row))
    for index, begin, end in cuts:
        if (end - begin) and (end - begin) % row == 0:
            yield (index, *(0 for _ in sizes[1:])), ((end - begin) // row, *sizes[1:])
        else:
            for offsets, extent in _rectangles(sizes[1:], begin - index * row, end - index * row):
                yield (index, *offsets), (1, *extent)


def common(a: Box, b: Box) -> tuple[Shape, Shape] | None:
    """(offsets, sizes) of what two rectangles of a tensor share."""
    offsets = tuple(max(x, y) for x, y in zip(a.offsets, b.offsets, strict=True))
    ends = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    sizes = tuple(min(ao + n, bo + m) - o for o, (ao, n, bo, m) in zip(offsets, ends, strict=True))
    return (offsets, sizes) if min(sizes, default=1) > 0 else None


def check_whole(pieces: Iterable[Piece], shape: Shape) -> None:
    """Raise ValueError unless the pieces hold every element of a tensor, and none twice."""
    ranges: dict[tuple[Shape, Shape], list[tuple[int, int]]] = defaultdict(list)
    for piece in pieces:
        inside = len(piece.offsets) == len(piece.sizes) == len(shape)
        if not inside or any(o + s > n for o, s, n in zip(piece.offsets, piece.sizes, shape, strict=True)):
            raise ValueError(f"a box {list(piece.sizes)} from {list(piece.offsets)} on is not part of {list(shape)}")
        ranges[piece.offsets, piece.sizes].append((piece.start, piece.stop))
    for (offsets, sizes), own in ranges.items():
        end = 0
        for start, stop in sorted(own):
            if start != end or stop <= start:
                what = "are there twice" if start < end else "are not there"
                raise ValueError(
                    f"elements {sorted((start, end))} of the box {list(sizes)} from {list(offsets)} on {what}"
                )
            end = stop
        if end != math.prod(sizes):
            raise ValueError(f"its box {list(sizes)} from {list(offsets)} on ends at {end}, not {math.prod(sizes)}")
    boxes = sorted(Box(offsets, sizes, 0) for offsets, sizes in ranges)
    for number, box in enumerate(boxes):
        for other in boxes[number + 1 :]:
            if other.offsets[0] >= box.offsets[0] + box.sizes[0]:
                break
            if common(box, other):
                raise ValueError(f"its boxes from {list(box.offsets)} and from {list(other.offsets)} on overlap")
    if sum(math.prod(box.sizes) for box in boxes) != math.prod(shape):
        raise ValueError(f"its pieces are not the whole of {list(shape)}")
