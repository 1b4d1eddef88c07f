"""From documents to sequences of a fixed length, in two ways; both find a row from its number and the .idx alone."""

# r rows, s tokens in a row, k spans (runs of one document inside one row)

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from prism_mcore.data.order import key_of, permute, shuffled_range
from prism_mcore.data.token_file import TokenFile, TokenFileError

_WINDOW = 4096  # documents packed together by best_fit


@dataclass(frozen=True)
class Spans:
    """What rows are made of, span by span, rows and columns ascending; positions that no span covers are padding.

    Rows of 4 tokens, the first holding tokens 0-2 (a whole document) and token 3 (the start of the next):

        row [0, 0, 1]  column [0, 3, 0]  start [0, 3, 4]  length [3, 1, 4]  closed [True, False, False]
    """

    row: np.ndarray  # [k] int64
    column: np.ndarray  # [k] int64, where in the row
    start: np.ndarray  # [k] int64, position in the token file
    length: np.ndarray  # [k] int64
    closed: np.ndarray  # [k] bool: the document ends with this span; else its next token follows in the file

    def of_rows(self, first: int, stop: int) -> "Spans":
        """The spans of rows first..stop-1, rows counted from 0 again."""
        chosen = slice(*np.searchsorted(self.row, [first, stop]))
        return Spans(
            self.row[chosen] - first, *(part[chosen] for part in (self.column, self.start, self.length, self.closed))
        )


def split_documents(file: TokenFile, validation_fraction: float) -> int:
    """The first validation document: documents from it on hold the last `validation_fraction` of the file's tokens.

    The split falls on the document border nearest to the exact token, with at least one document on each side, so that
    training and validation share no document. Raises TokenFileError where the file is empty or has one document.
    """
    if file.num_tokens == 0:
        raise TokenFileError(f"{file.prefix}.bin: no tokens in this source; remove it from data.sources")
    if validation_fraction == 0:
        return file.num_documents
    exact = round(file.num_tokens * (1 - validation_fraction))
    border = file.documents_until(max(0, exact - 1))  # the first one at or after the exact token
    around = np.array([border - 1, border])
    starts = file.document_starts(border - 1, border + 1)
    inside = (starts > 0) & (starts < file.num_tokens)
    if not inside.any():
        raise TokenFileError(
            f"{file.prefix}.bin: one document of {file.num_tokens} tokens cannot be divided by "
            "data.validation_fraction="
            f"{validation_fraction}; the source needs at least two documents"
        )
    return int(around[inside][np.argmin(np.abs(starts[inside] - exact))])


class Concat:
    """Concatenate and split, as the paper: row k is tokens [k s, k s + s) of documents [first, stop).

    Its last label is token k s + s. Each epoch visits the rows in another order. The tail shorter than s + 1 tokens is
    left out of every epoch.
    """

    fill_rate = 1.0

    def __init__(self, file: TokenFile, first: int, stop: int, seq_len: int):
        self.file, self.seq_len = file, seq_len
        self._start = int(file.document_starts(first, first + 1)[0])
        self.num_tokens = int(file.document_starts(stop, stop + 1)[0]) - self._start
        self.num_rows = max(0, self.num_tokens - 1) // seq_len

    def shuffle(self, ordinals: np.ndarray, seed: int, source: int) -> np.ndarray:
        """The ordinal-th row to be read, over all epochs: int64 [r] -> row numbers int64 [r]."""
        epochs, within = np.divmod(ordinals, self.num_rows)
        one_epoch = len(epochs) > 0 and (epochs == epochs[0]).all()
        return permute(within, self.num_rows, key_of(seed, source, int(epochs[0]) if one_epoch else epochs))

    def spans(self, rows: np.ndarray) -> Spans:
        """Row numbers int64 [r] -> their spans."""
        s, r = self.seq_len, len(rows)
        begins = self._start + rows * s
        borders = self.file.starts_between(begins, begins + s)
        row = np.repeat(np.arange(r), [1 + len(inner) for inner in borders])
        start = np.concatenate(
            [part for begin, inner in zip(begins, borders, strict=True) for part in ([begin], inner)]
        )
        # Documents of length 0 share their start with the next one: of equal starts one is kept.
        fresh = np.ones(len(row), dtype=bool)
        fresh[1:] = (row[1:] != row[:-1]) | (start[1:] != start[:-1])
        row, start = row[fresh], start[fresh]
        column = start - begins[row]
        inside = np.flatnonzero(column < s)  # a border at s is the next row's
        last = np.append(row[1:] != row[:-1], True)
        length = np.where(last, s, np.append(column[1:], 0)) - column
        return Spans(row[inside], column[inside], start[inside], length[inside], ~last[inside])


class BestFit:
    """Best-fit-decreasing packing over windows of 4,096 consecutive documents.

    A window of t tokens gives exactly ceil(t / s) rows, so the number of rows of an epoch and the window of a row are
    known from a few entries of the .idx, before anything is packed. Documents longer than s give full rows and a rest;
    whole documents and rests then go, longest first, to the fullest row that still holds them. What fits nowhere whole,
    once all rows are open, is split to fill the holes. Each token appears exactly once per epoch; padding is less than
    one row per window. The price, against packing that opens rows without limit, is the few documents split at the end
    of a window (a percent of them, typically).

    The contents of a row do not change; each epoch visits the windows, and the rows of a window, in another order. A
    row costs the packing of its window (~5 ms), shared by the rows read after it.
    """

    def __init__(self, file: TokenFile, first: int, stop: int, seq_len: int):
        self.file, self.seq_len = file, seq_len
        self._first, self._stop = first, stop
        borders = [*range(first, stop, _WINDOW), stop]
        starts = np.concatenate([file.document_starts(border, border + 1) for border in borders])
        self.num_tokens = int(starts[-1] - starts[0])
        self._rows_of = -(-np.diff(starts) // seq_len)  # [windows]
        self._first_row = np.concatenate([[0], np.cumsum(self._rows_of)])
        self.num_rows = int(self._first_row[-1])
        self.fill_rate = self.num_tokens / (self.num_rows * seq_len) if self.num_rows else 0.0
        # Bound to the instance: packed windows are small (some 30 bytes per document) and die with it.
        self._pack = lru_cache(maxsize=16)(self._pack_window)
        self._windows = lru_cache(maxsize=2)(self._windows_in_order)
        self._row_order = lru_cache(maxsize=64)(self._shuffled_rows)

    def shuffle(self, ordinals: np.ndarray, seed: int, source: int) -> np.ndarray:
        """The ordinal-th row to be read, over all epochs: int64 [r] -> row numbers int64 [r]."""
        out = np.empty(len(ordinals), dtype=np.int64)
        epochs, within = np.divmod(ordinals, self.num_rows)
        for epoch in np.unique(epochs):
            windows, firsts = self._windows(seed, source, int(epoch))
            chosen = np.flatnonzero(epochs == epoch)
            turns = np.searchsorted(firsts, within[chosen], side="right") - 1
            for turn in np.unique(turns):
                here = chosen[turns == turn]
                window = int(windows[turn])
                rows = self._row_order(seed, source, int(epoch), window)
                out[here] = self._first_row[window] + rows[within[here] - firsts[turn]]
        return out

    def spans(self, rows: np.ndarray) -> Spans:
        """Row numbers int64 [r] -> their spans."""
        windows = np.searchsorted(self._first_row, rows, side="right") - 1
        parts = []
        for number, (row, window) in enumerate(zip(rows, windows, strict=True)):
            packed = self._pack(int(window)).of_rows(*(int(row - self._first_row[window]) + end for end in (0, 1)))
            parts.append((packed.row + number, packed.column, packed.start, packed.length, packed.closed))
        return Spans(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _windows_in_order(self, seed: int, source: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows in the order of an epoch, and the number of rows before each."""
        count = len(self._rows_of)
        windows = permute(np.arange(count), count, key_of(seed, source, epoch))
        return windows, np.concatenate([[0], np.cumsum(self._rows_of[windows])[:-1]])

    def _shuffled_rows(self, seed: int, source: int, epoch: int, window: int) -> np.ndarray:
        return shuffled_range(int(self._rows_of[window]), key_of(seed, source, epoch, window))

    def _pack_window(self, window: int) -> Spans:
        first = self._first + window * _WINDOW
        starts = self.file.document_starts(first, min(first + _WINDOW, self._stop) + 1)
        return pack_best_fit(starts, self.seq_len)


def pack_best_fit(starts: np.ndarray, seq_len: int) -> Spans:
    """Pack the documents [starts[i], starts[i + 1]) into exactly ceil(tokens / s) rows; see BestFit."""
    ends = starts[1:]
    num_rows = -(-int(ends[-1] - starts[0]) // seq_len)
    pieces: list[tuple[int, int, int, int]] = []  # row, column, start, length
    rests = []  # (length, start) of what is shorter than a row
    for start, length in zip(starts[:-1].tolist(), np.diff(starts).tolist(), strict=True):
        while length >= seq_len:
            pieces.append((len(pieces), 0, start, seq_len))
            start, length = start + seq_len, length - seq_len
        if length:
            rests.append((length, start))
    rests.sort(key=lambda rest: (-rest[0], rest[1]))
    opened = len(pieces)
    rows_with_room: defaultdict[int, list[int]] = defaultdict(list)  # by free tokens
    rooms = _Rooms()
    homeless = []
    for length, start in rests:
        room = rooms.smallest_at_least(length)
        if room is not None:
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms.remove(room)
        elif opened < num_rows:
            row, room = opened, seq_len
            opened += 1
        else:
            homeless.append((length, start))
            continue
        pieces.append((row, seq_len - room, start, length))
        if room > length:
            rows_with_room[room - length].append(row)
            rooms.add(room - length)
    holes = [(room, row) for room, rows in sorted(rows_with_room.items()) for row in rows]  # largest last
    for length, start in homeless:
        while length:
            room, row = holes.pop()
            used = min(room, length)
            pieces.append((row, seq_len - room, start, used))
            start, length = start + used, length - used
            if room > used:
                holes.append((room - used, row))
    pieces.sort()
    table = np.array(pieces, dtype=np.int64).reshape(-1, 4)
    begin, size = table[:, 2], table[:, 3]
    return Spans(table[:, 0], table[:, 1], begin, size, np.isin(begin + size, ends))


class _Rooms:
    """A set of small integers that finds its smallest member >= x: one Python integer as a bit set."""

    def __init__(self) -> None:
        self._bits = 0

    def add(self, x: int) -> None:
        self._bits |= 1 << x

    def remove(self, x: int) -> None:
        self._bits ^= 1 << x

    def smallest_at_least(self, x: int) -> int | None:
        above = self._bits >> x
        return x + (above & -above).bit_length() - 1 if above else None
