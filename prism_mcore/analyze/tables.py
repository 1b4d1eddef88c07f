"""Tidy tables as files: CSV for people, parquet for programs; whole or not there."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prism_mcore.checkpoint.durable import write_atomically

Row = dict[str, Any]


def write_csv(path: Path, rows: Sequence[Row], columns: Sequence[str] | None = None) -> None:
    """A line for each row, with the columns of the first, or these; None is an empty field."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns or rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def write_parquet(path: Path, rows: Sequence[Row]) -> None:
    """The same as columns of their types."""
    import pyarrow
    import pyarrow.parquet

    part = path.with_name(f".tmp_{path.name}")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), part)
    part.replace(path)
