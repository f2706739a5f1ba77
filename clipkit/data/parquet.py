"""Parquet files by pyarrow, which is optional (`clipkit[data]`): opened in one way, read in little memory."""

from __future__ import annotations

import importlib
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from clipkit.types import ConfigError, DataError

PARQUET_SUFFIXES = (".parquet", ".pq")
_CELLS = 16  # in memory at a time: cells may be photographs
_BUFFER = 1 << 20  # bytes of a column that are read at a time


def pyarrow() -> tuple[Any, Any]:
    """Returns the modules pyarrow and pyarrow.parquet; ConfigError when they are not installed."""
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError("Parquet needs the package pyarrow", "install clipkit[data]") from error


@contextmanager
def opened_parquet(path: Path) -> Iterator[Any]:
    """The file (pyarrow.parquet.ParquetFile), open while the block runs; its errors leave as DataError."""
    arrow, parquet = pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (OSError, arrow.ArrowException) as error:
        detail = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be read ({detail})", "write the Parquet file again") from error


class ColumnCells:
    """The cells of one column by their row, a few in memory at a time, however large the row groups are.

    What is held is a page of the file besides: as pyarrow writes them, up to a thousand cells.
    Rows are best asked for in rising order: to go back begins the row group again.
    """

    def __init__(self, path: Path, column: str) -> None:
        # Without pre_buffer, which holds a row group's bytes: writers make one group of a million rows.
        self._file = pyarrow()[1].ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)
        counts = [self._file.metadata.row_group(n).num_rows for n in range(self._file.num_row_groups)]
        self._starts = list(accumulate(counts, initial=0))
        self._column = column
        self._batches: Iterator[Any] = iter(())
        self._held: list[Any] = []
        self._first = self._next = self._end = 0

    def at(self, row: int) -> Any:
        """Returns the cell of a row; raises OSError, ValueError for damage and unknown rows."""
        if not 0 <= row < self._starts[-1]:
            raise ValueError(f"row {row} of {self._starts[-1]}")
        if row < self._first or row >= self._end:
            group = bisect_right(self._starts, row) - 1
            self._batches = self._file.iter_batches(
                _CELLS, row_groups=[group], columns=[self._column], use_threads=False
            )
            self._first = self._next = self._starts[group]
            self._end = self._starts[group + 1]
            self._held = []
        while row >= self._next:
            batch = next(self._batches, None)
            if batch is None:
                raise ValueError(f"the column ends before row {row}")
            self._first, self._next = self._next, self._next + batch.num_rows
            self._held = batch.column(0).to_pylist() if row < self._next else []
        return self._held[row - self._first]
