"""Packing: every token once per epoch, borders known, rows found by number."""

import numpy as np
import pytest
from tiny.token_files import random_lengths, write_tokens

from prism_mcore.data import packing
from prism_mcore.data.packing import BestFit, Concat, Spans, pack_best_fit, split_documents
from prism_mcore.data.token_file import TokenFile, TokenFileError


def covered(spans: Spans) -> np.ndarray:
    """All token positions of the spans, sorted."""
    return np.sort(np.concatenate([np.arange(a, a + n) for a, n in zip(spans.start, spans.length, strict=True)]))


def check_columns(spans: Spans, seq_len: int) -> None:
    """Rows ascend, each starts at column 0, its spans touch and stay inside."""
    for row in np.unique(spans.row):
        here = np.flatnonzero(spans.row == row)
        assert np.array_equal(here, np.arange(here[0], here[-1] + 1))
        ends = spans.column[here] + spans.length[here]
        assert spans.column[here[0]] == 0 and np.array_equal(spans.column[here[1:]], ends[:-1]) and ends[-1] <= seq_len
        assert (spans.length[here] > 0).all()


def test_concat_cuts_the_corpus_into_rows_and_knows_the_borders(tmp_path):
    file = TokenFile(write_tokens(tmp_path / "c", [3, 0, 5, 4, 0, 9]))
    spans = Concat(file, 0, 6, 4).spans(np.array([0, 1, 2, 3, 4]))
    assert spans.row.tolist() == [0, 0, 1, 2, 3, 4]
    assert spans.column.tolist() == [0, 3, 0, 0, 0, 0]
    assert spans.start.tolist() == [0, 3, 4, 8, 12, 16]
    assert spans.length.tolist() == [3, 1, 4, 4, 4, 4]
    assert spans.closed.tolist() == [True, False, True, True, False, False]  # 21 tokens: the last label is token 20


def test_an_epoch_of_concat_reads_each_row_once_in_another_order_than_the_next(tmp_path):
    rows = Concat(TokenFile(write_tokens(tmp_path / "c", random_lengths(0, 100, 9))), 0, 100, 8)
    first, second = (rows.shuffle(np.arange(rows.num_rows) + epoch * rows.num_rows, 1, 0) for epoch in (0, 1))
    assert np.array_equal(np.sort(first), np.arange(rows.num_rows))
    assert np.array_equal(np.sort(second), np.arange(rows.num_rows)) and not np.array_equal(first, second)
    assert not np.array_equal(first, rows.shuffle(np.arange(rows.num_rows), 2, 0))  # another seed
    assert not np.array_equal(first, rows.shuffle(np.arange(rows.num_rows), 1, 1))  # another source


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("seq_len", [8, 64])
def test_best_fit_covers_each_token_once_and_pads_less_than_a_row(seed, seq_len):
    starts = np.concatenate([[0], np.cumsum(random_lengths(seed, 300, 25))]) + 1000
    spans = pack_best_fit(starts, seq_len)
    assert np.array_equal(covered(spans), np.arange(starts[0], starts[-1]))
    check_columns(spans, seq_len)
    assert spans.row.max() + 1 == -(-(starts[-1] - starts[0]) // seq_len)
    assert np.array_equal(spans.closed, np.isin(spans.start + spans.length, starts[1:]))


def test_best_fit_keeps_documents_whole_where_they_fit():
    starts = np.cumsum([0, 5, 3, 6, 2, 8])
    spans = pack_best_fit(starts, 8)
    assert sorted(spans.length.tolist()) == [2, 3, 5, 6, 8] and spans.closed.all()


def test_best_fit_cuts_few_documents():
    """Lognormal lengths as in web text, median 500: whole documents but for the over-long and ~1% at a window's end."""
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(6.2, 1.1, 4096)).astype(np.int64)
    spans = pack_best_fit(np.concatenate([[0], np.cumsum(lengths)]), 8192)
    needed = (-(-lengths // 8192)).sum()
    assert len(spans.start) - needed < 0.02 * len(lengths)


@pytest.mark.parametrize("first", [0, 3])
def test_an_epoch_of_best_fit_covers_each_token_once_over_many_windows(tmp_path, monkeypatch, first):
    monkeypatch.setattr(packing, "_WINDOW", 16)
    lengths = random_lengths(2, 100, 30)
    lengths[20:25] = [0] * 5
    file = TokenFile(write_tokens(tmp_path / "c", lengths))
    rows = BestFit(file, first, 95, 32)
    ends = np.cumsum([0, *lengths])
    for epoch in (0, 1):
        order = rows.shuffle(np.arange(rows.num_rows) + epoch * rows.num_rows, 5, 0)
        spans = rows.spans(order)
        check_columns(spans, 32)
        assert np.array_equal(np.sort(order), np.arange(rows.num_rows)) and not np.array_equal(order, np.sort(order))
        assert np.array_equal(covered(spans), np.arange(ends[first], ends[95]))
    some = np.array([rows.num_rows + 3, 2, 2 * rows.num_rows - 1])
    assert rows.shuffle(some, 5, 0)[0] == order[3] and rows.shuffle(some, 5, 0)[2] == order[-1]
    assert rows.fill_rate == pytest.approx((ends[95] - ends[first]) / (rows.num_rows * 32))


def test_best_fit_shuffles_the_rows_of_a_window(tmp_path):
    rows = BestFit(TokenFile(write_tokens(tmp_path / "c", random_lengths(0, 200, 20))), 0, 200, 32)
    first, second = (rows.shuffle(np.arange(rows.num_rows) + epoch * rows.num_rows, 1, 0) for epoch in (0, 1))
    assert not np.array_equal(first, np.arange(rows.num_rows)) and not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("lengths", "fraction", "cut"),
    [
        ([10, 10, 10, 10], 0.0, 4),
        ([10, 10, 10, 10], 0.1, 3),  # not 4: one document is left for validation
        ([10, 10, 10, 10], 0.35, 3),
        ([10, 10, 10, 10], 0.4, 2),
        ([10, 10, 10, 10], 0.99, 1),  # not 0: one is left for training
        ([10, 990], 0.1, 1),
        ([0, 20, 0, 20, 0], 0.5, 2),  # whichever side the empty document falls on, the tokens are halved
    ],
)
def test_validation_starts_at_the_nearest_document_border(tmp_path, lengths, fraction, cut):
    assert split_documents(TokenFile(write_tokens(tmp_path / "c", lengths)), fraction) == cut


def test_a_split_that_leaves_nothing_to_train_on_is_an_error(tmp_path):
    with pytest.raises(TokenFileError, match=r"c\.bin: .*at least two documents"):
        split_documents(TokenFile(write_tokens(tmp_path / "c", [0, 10, 0])), 0.1)
