"""Rows of CSV and TSV tables, and the folder or zip file of the images that they name."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import math
import os
import stat
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from clipkit.types import ConfigError, DataError

ARCHIVE = "images.zip"
# Names that others give to columns of captions, the most telling first.
CAPTION_COLUMNS = (
    *("caption", "captions", "title", "text", "description"),
    *("alt", "alt_text", "txt", "sentence", "prompt"),
)
TAB_SUFFIXES = (".tsv", ".tab")
# Of an image; ValueError: a name with a NUL character or half a surrogate pair.
UNREADABLE = (OSError, KeyError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)
UNREADABLE_TABLE = (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error)


@dataclass(frozen=True)
class RowReject:
    """One row that cannot be a sample, and why. row: from 1, the first one below the names of the columns."""

    row: int
    image: str
    reason: str
    detail: str


@dataclass
class ImageRoot:
    """Where the images of a table lie: below a folder, or inside a zip file.

    A zip handle belongs to one process: forked ones would share its position.
    """

    path: Path
    _handle: tuple[int, zipfile.ZipFile] | None = field(default=None, init=False, repr=False)

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_handle": None}

    def read(self, image: str, size: int = -1) -> bytes:
        """Returns the first `size` bytes of an image (all by default); raises one of UNREADABLE."""
        if self.path.is_dir():
            # Opening a pipe would wait for ever, and a device may have no end.
            if not stat.S_ISREG(os.stat(self.path / image).st_mode):
                raise OSError("not a file")
            with open(self.path / image, "rb") as stream:
                return stream.read(size)
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = os.getpid(), zipfile.ZipFile(self.path)
        archive = self._handle[1]
        entry = str(PurePosixPath(image))
        if entry not in archive.NameToInfo:
            entry = entry.removeprefix("images/")
        with archive.open(entry) as member:
            return member.read(size)


def find_root(table: Path, given: Path | None, image: str) -> ImageRoot:
    """Returns the root of the images: `given`, or the folder of the table, or images.zip there.

    `image` is the first image of the table. ConfigError when there is nothing of the kind.
    """
    beside = table.parent
    if given is None:
        archive = beside / ARCHIVE
        return ImageRoot(archive if archive.is_file() and not (beside / image).is_file() else beside)
    if given.is_dir() or (given.is_file() and zipfile.is_zipfile(given)):
        return ImageRoot(given)
    raise ConfigError(f"{given}: neither a folder nor a zip file", "point --images at the images")


def open_table(table: Path) -> TextIO:
    """Returns a table opened as UTF-8 text, unpacked when its name ends in .gz; raises OSError."""
    if table.suffix.lower() == ".gz":
        return gzip.open(table, "rt", encoding="utf-8-sig", newline="")
    return table.open(encoding="utf-8-sig", newline="")


def table_suffix(table: Path) -> str:
    """Returns the lower-case extension of a table, that of what is packed for .gz."""
    return (table.with_suffix("") if table.suffix.lower() == ".gz" else table).suffix.lower()


def _delimiter(table: Path) -> str:
    return "\t" if table_suffix(table) in TAB_SUFFIXES else ","


def read_columns(table: Path) -> list[str]:
    """Returns the names in the first line of a CSV (TSV by its extension); raises DataError."""
    try:
        with open_table(table) as stream:
            return next(csv.reader(stream, delimiter=_delimiter(table)), [])
    except UNREADABLE_TABLE as error:
        raise _unreadable(table, error) from error


def refuse_nameless(table: Path, columns: Sequence[str]) -> None:
    """Raises DataError for a table whose first line names no columns."""
    if not columns:
        cause = "its first line is empty" if table.stat().st_size else "empty (0 bytes)"
        raise DataError(
            f"{table}: {cause}, where the names of the columns should be",
            "begin it with a line such as filepath,caption and add one row per image or caption",
        )


def _unreadable(table: Path, error: Exception) -> DataError:
    return DataError(f"{table}: cannot be read ({error})", "save it as a UTF-8 CSV or TSV file")


def stream_rows(table: Path, columns: Sequence[str], cure: str) -> Iterator[dict[str, str]]:
    """Yields the rows of a CSV (TSV by its extension, gzip by a further .gz); `columns` must be there.

    Raises DataError for an unreadable table, a missing column (with `cure`), a row that does not fit the
    first line, and a table without rows.
    """
    empty = True
    try:
        with open_table(table) as stream:
            reader = csv.DictReader(stream, delimiter=_delimiter(table))
            found = reader.fieldnames or []
            refuse_nameless(table, found)
            for name in columns:
                if name not in found:
                    raise DataError(f"{table}: no column '{name}' (found: {', '.join(found)})", cure)
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{table}: line {reader.line_num} does not have the columns of the first line",
                        "quote fields that contain the delimiter or a line break",
                    )
                empty = False
                yield row
    except UNREADABLE_TABLE as error:
        raise _unreadable(table, error) from error
    if empty:
        raise DataError(
            f"{table}: no rows below the names of its columns", "add one row per image or caption"
        )


def read_rows(table: Path, columns: Sequence[str], cure: str) -> list[dict[str, str]]:
    """Returns the rows of a table in order; columns and errors as in `stream_rows`."""
    return list(stream_rows(table, columns, cure))


def jsonable(value: Any) -> Any:
    """Returns a value of a column as JSON keeps it: numbers stay numbers, those that are none become null.

    A decimal is a number too, for conditions compare it: an int without decimal places, else the nearest
    float. Times, durations and UUIDs become text. ConfigError for what has no form in JSON, such as bytes.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, decimal.Decimal):
        return int(value) if value.as_tuple().exponent == 0 else jsonable(float(value))
    if isinstance(value, Mapping):
        return {str(name): jsonable(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(each) for each in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta | uuid.UUID):
        return str(value)
    raise ConfigError(
        f"a column holds {type(value).__name__}, which JSON cannot",
        "leave the column out (--keep, --columns)",
    )
