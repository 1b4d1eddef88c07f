"""Which rows of which key a tensor-parallel rank holds, and where they lie in a Hugging Face directory."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from prism_mcore.convert.names import HFTensor, RowRange, parts
from prism_mcore.model.parameters import Parameter


@dataclass(frozen=True)
class Copy:
    """The same `rows` rows in two places."""

    name: str  # the tensor of the Hugging Face directory
    hf_row: int
    row: int  # in a tensor of ours: a rank's parameter, or a key
    rows: int


class Places:
    """Where the rows of every key are found among Hugging Face's tensors (tied duplicates left out)."""

    def __init__(self, tensors: dict[str, HFTensor]):
        self._runs: dict[str, list[tuple[RowRange, str, int]]] = defaultdict(list)
        for name, tensor in tensors.items():
            hf_row = 0
            for run in tensor.runs if not tensor.optional else ():
                self._runs[run.key].append((run, name, hf_row))
                hf_row += run.rows

    def find(self, wanted: RowRange, row: int = 0) -> Iterator[Copy]:
        """Every piece of `wanted`, whose first row is row `row` of a tensor of ours."""
        for run, name, hf_row in self._runs[wanted.key]:
            if shared := overlap(run, wanted):
                yield Copy(name, hf_row + shared.start - run.start, row + shared.start - wanted.start, shared.rows)


def held_rows(name: str, parameter: Parameter, rank: int, tp: int) -> Iterator[tuple[RowRange, int]]:
    """What tensor-parallel rank `rank` of `tp` holds of a parameter: runs of its keys, and their rows in its tensor.

    Rows that only pad the vocabulary are left out.
    """
    row = 0
    for key, shape in parts(name, parameter).items():
        rows, start = shape[0], 0
        if parameter.tp_axis == 0:
            each = -(-rows // tp)  # only the vocabulary need not divide
            start, rows = rank * each, max(0, min(each, rows - rank * each))
        if rows:
            yield RowRange(key, start, rows), row
        row += rows


def held_columns(parameter: Parameter, rank: int, tp: int) -> slice:
    """The columns of a parameter that this rank holds."""
    if parameter.tp_axis != 1:
        return slice(None)
    each = parameter.shape[1] // tp
    return slice(rank * each, (rank + 1) * each)


def runs_within(tensor: HFTensor, start: int, stop: int) -> Iterator[tuple[RowRange, int]]:
    """Rows [start, stop) of a Hugging Face tensor: which rows of which keys, and where they come in the result."""
    hf_row = 0
    for run in tensor.runs:
        first, last = max(start, hf_row), min(stop, hf_row + run.rows)
        if first < last:
            yield RowRange(run.key, run.start + first - hf_row, last - first), first - start
        hf_row += run.rows


def overlap(run: RowRange, other: RowRange) -> RowRange | None:
    """The rows that two runs of one key share."""
    start, stop = max(run.start, other.start), min(run.start + run.rows, other.start + other.rows)
    return RowRange(run.key, start, stop - start) if start < stop else None
