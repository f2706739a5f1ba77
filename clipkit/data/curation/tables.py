"""Lists of samples as files: keys to keep, scores, samples that were dropped. Written row by row."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from clipkit.data.buckets import Buckets
from clipkit.data.parquet import opened_parquet, pyarrow
from clipkit.redaction import redact, visible
from clipkit.types import ConfigError, DataError

FORMATS = (".csv", ".parquet", ".npy")


def check_format(path: Path, formats: Sequence[str], option: str) -> None:
    """Raises ConfigError unless the file can be written in the format that its name asks for."""
    if path.suffix not in formats:
        raise ConfigError(
            f"{option} {path}: the name says no known format", f"end it in {' or '.join(formats)}"
        )
    if path.suffix == ".parquet":
        pyarrow()


def shard_labels(shards: Sequence[str]) -> list[str]:
    """Returns what lists call the shards: their file names where these are unique, otherwise whole paths."""
    names = [os.path.basename(shard.partition("?")[0]) for shard in shards]
    return names if len(set(names)) == len(names) else [redact(shard) for shard in shards]


class RowWriter(Protocol):
    """Takes columns of equal length, portion by portion."""

    def __call__(self, columns: Mapping[str, Sequence[Any]]) -> None: ...


@contextmanager
def written_table(path: Path) -> Iterator[RowWriter]:
    """Writes a CSV or Parquet table that takes its name when it is complete.

    Columns `shard` and `key` are text, every other one float64.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with _parquet_rows(temporary) if path.suffix == ".parquet" else _csv_rows(temporary) as write:
            yield write
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _csv_rows(path: Path) -> Iterator[RowWriter]:
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        begun = False

        def write(columns: Mapping[str, Sequence[Any]]) -> None:
            nonlocal begun
            if not begun:
                writer.writerow(columns)
                begun = True
            writer.writerows(zip(*columns.values(), strict=True))

        yield write


@contextmanager
def _parquet_rows(path: Path) -> Iterator[RowWriter]:
    arrow, parquet = pyarrow()
    writer: Any = None

    def write(columns: Mapping[str, Sequence[Any]]) -> None:
        nonlocal writer
        kinds = {name: arrow.string() if name in ("shard", "key") else arrow.float64() for name in columns}
        table = arrow.table(
            {name: arrow.array(list(values), kinds[name]) for name, values in columns.items()}
        )
        if writer is None:
            writer = parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()


def read_scores(path: Path) -> Iterator[tuple[str, str, float]]:
    """Yields (shard, key, score) of a table that was written with --scores-out, row by row."""
    columns = ("shard", "key", "score")
    cure = "give a table written with --scores-out"
    try:
        if path.suffix == ".parquet":
            with opened_parquet(path) as file:
                for batch in file.iter_batches(columns=columns):
                    yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
            return
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
            for row in csv.DictReader(stream):
                yield row["shard"], row["key"], float(row["score"])
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}", cure) from error
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise DataError(f"{path}: not a table of shard, key and score ({error})", cure) from error


@contextmanager
def written_lines(path: Path) -> Iterator[Any]:
    """Writes JSON lines to a file that takes its name when it is complete: call with one mapping per line."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as stream:
            yield lambda values: stream.write(visible(json.dumps(values, ensure_ascii=False)) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_uids(path: Path, halves: Iterator[NDArray[np.uint64]], num_uids: int, folder: Path) -> None:
    """Writes DataComp's subset file: dtype u8,u8, sorted by both halves, from (n, 2) parts.

    folder: of the job itself, for files of its own while it sorts.
    DataError for a uid that occurs twice: DataComp's resharder would write the sample twice.
    """
    kind = np.dtype([("high", "<u8"), ("low", "<u8")])
    temporary = path.with_name(path.name + ".tmp")
    try:
        with Buckets(folder, kind, num_uids) as buckets, temporary.open("wb") as out:
            for part in halves:
                records = np.zeros(len(part), kind)
                records["high"], records["low"] = part[:, 0], part[:, 1]
                buckets.add(part[:, 0], records)
            np.lib.format.write_array_header_1_0(
                out,
                {"descr": [("f0", "<u8"), ("f1", "<u8")], "fortran_order": False, "shape": (num_uids,)},
            )
            for records in buckets:
                records = records[np.lexsort((records["low"], records["high"]))]
                twice = np.flatnonzero(records[1:] == records[:-1])
                if len(twice):
                    high, low = records[twice[0]].tolist()
                    raise DataError(
                        f"the uid {high:016x}{low:016x} occurs twice",
                        "remove duplicates first: clipkit data dedup",
                    )
                out.write(records.tobytes())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
