"""A list of addresses to download: its format, its columns, and how many rows it has. Loads no torch."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from clipkit.data.parquet import opened_parquet
from clipkit.data.tables import CAPTION_COLUMNS
from clipkit.types import ConfigError, DataError

FORMATS = ("txt", "csv", "tsv", "json", "jsonl", "parquet")
URL_COLUMNS = ("url", "image_url", "img_url", "link")
# img2dataset writes fields of these names itself.
RESERVED = (
    *("key", "caption", "url", "width", "height", "original_width", "original_height", "status"),
    *("error_message", "exif", "md5", "sha256", "sha512"),
)
_COUNTED_BYTES = 1 << 30  # rows of larger text files are not counted: a pass over them takes minutes


@dataclass(frozen=True)
class UrlList:
    """A list of addresses.

    kind     as img2dataset calls it: one of FORMATS, with .gz where it is compressed
    columns  of a table; None for plain addresses, and where they are not known before all is read
    rows     of each file; None where they are not counted
    """

    path: Path
    kind: str
    columns: tuple[str, ...] | None
    rows: tuple[int, ...] | None

    def num_shards(self, per_shard: int) -> int | None:
        """Returns how many shards img2dataset makes of the list: every file begins a new one."""
        return None if self.rows is None else sum(-(-rows // per_shard) for rows in self.rows)


def read_list(path: Path) -> UrlList:
    """Returns what is known of a file, or of a folder of files of one format.

    Raises ConfigError for a path or format that cannot be downloaded from, DataError for damaged content.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder", "check the path of the list of addresses")
    files = _files(path)
    kind = _kind(files[0])
    assert kind is not None, "only files of a known kind are taken"
    columns: tuple[str, ...] | None = None
    rows: list[int | None] = []
    try:
        for number, file in enumerate(files):
            found, count = _look(file, kind)
            if number and found != columns:
                raise DataError(
                    f"{file}: other columns than {files[0].name}",
                    "download files of different columns one by one",
                )
            columns = found
            rows.append(count)
    except (UnicodeDecodeError, csv.Error, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file}: not a readable {kind} file ({error})", "write it as UTF-8 text") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})", "check the storage") from error
    counted = None if None in rows else tuple(count or 0 for count in rows)
    if counted is not None and not sum(counted):
        raise DataError(f"{path}: holds no address", "give a list with at least one row")
    return UrlList(path, kind, columns, counted)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if _kind(path) is None:
            raise ConfigError(
                f"{path}: not a list of addresses that is read (by its name)",
                f"name it .{', .'.join(FORMATS)}, text formats also with .gz",
            )
        return [path]
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    kinds = {kind for file in files if (kind := _kind(file)) is not None}
    if len(kinds) != 1:
        found = (
            f"lists of different formats ({', '.join(sorted(kinds))})" if kinds else "no list of addresses"
        )
        raise ConfigError(f"{path}: holds {found}", "give one file, or a folder of files of one format")
    return [file for file in files if _kind(file) in kinds]


def _kind(file: Path) -> str | None:
    name = file.name.lower()
    packed = name.endswith(".gz")
    ending = name.removesuffix(".gz").rpartition(".")[2]
    if ending not in FORMATS or (packed and ending == "parquet"):
        return None
    return f"{ending}.gz" if packed else ending


def _look(file: Path, kind: str) -> tuple[tuple[str, ...] | None, int | None]:
    """Returns (columns, rows) of one file."""
    plain = kind.removesuffix(".gz")
    if plain == "parquet":
        return _look_parquet(file)
    if plain == "json":
        return None, None  # one value, which has to be read whole
    counted = file.stat().st_size <= _COUNTED_BYTES
    with _opened(file) as stream:
        if plain == "txt":
            return None, _count_lines(file, stream) if counted else None
        if plain == "jsonl":
            lines = (line for line in stream if line.strip())
            first = next(lines, None)
            columns = () if first is None else _keys(file, first)
            return columns, (first is not None) + sum(1 for _ in lines) if counted else None
        reader = csv.reader(stream, delimiter="\t" if plain == "tsv" else ",")
        columns = tuple(next(reader, []))
        return columns, _count_rows(file, reader) if counted else None


def _opened(file: Path) -> IO[str]:
    if file.name.lower().endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return open(file, encoding="utf-8-sig", newline="")


def _count_rows(file: Path, reader: Any) -> int:
    count, before = 0, reader.line_num
    for row in reader:
        if reader.line_num > before + 1:
            # img2dataset takes every line for a row.
            raise DataError(
                f"{file}:{before + 1}: a line break within a cell, which img2dataset cannot read",
                "write the list as .jsonl or .parquet",
            )
        before = reader.line_num
        count += bool(row)
    return count


def _count_lines(file: Path, stream: Iterator[str]) -> int:
    count = 0
    for number, line in enumerate(stream, 1):
        if "," in line:
            # img2dataset reads it as a CSV of one column, and ends at such a line.
            raise DataError(
                f"{file}:{number}: an address with a comma, which img2dataset cannot read from a .txt file",
                "write the list as .jsonl or .csv with the column url, where it can be quoted",
            )
        count += bool(line.strip())
    return count


def _keys(file: Path, line: str) -> tuple[str, ...]:
    try:
        first: Any = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{file}: the first line is no JSON ({error})", "write one object per line"
        ) from error
    if not isinstance(first, dict):
        raise DataError(f"{file}: the first line is no JSON object", "write one object per line")
    return tuple(first)


def _look_parquet(file: Path) -> tuple[tuple[str, ...], int]:
    with opened_parquet(file) as opened:
        return tuple(opened.schema_arrow.names), int(opened.metadata.num_rows)


@dataclass(frozen=True)
class Columns:
    """Which columns are read: the address, the caption (None: there is none), and those kept as fields."""

    url: str
    caption: str | None
    kept: tuple[str, ...]


def choose_columns(found: UrlList, url: str | None, caption: str | None, kept: Sequence[str]) -> Columns:
    """Returns the columns that were asked for, or else those whose names say what they hold.

    Without a wish `uid` is kept where it exists. Raises ConfigError for columns that do not exist, for a
    table that does not say where its captions are, and for names that img2dataset cannot take.
    """
    columns = found.columns
    if columns is None:
        if found.kind.startswith("txt") and (url or caption or kept):
            raise ConfigError(
                f"{found.path}: a .txt list has no columns", "leave out the column options, or give a table"
            )
        return Columns(url or "url", caption, tuple(kept))
    url = url or _named(columns, URL_COLUMNS)
    caption = caption or _named(columns, CAPTION_COLUMNS)
    for what, name in (("url", url), ("caption", caption)):
        if name is None:
            raise ConfigError(
                f"{found.path}: no column is named like {what}s (found: {', '.join(columns)})",
                f"name it with --{what}-key",
            )
    chosen = Columns(url or "", caption, tuple(kept) or (("uid",) if "uid" in columns else ()))
    _check(found, columns, chosen)
    return chosen


def _named(columns: Sequence[str], names: Sequence[str]) -> str | None:
    lower = {column.lower(): column for column in reversed(columns)}
    return next((lower[name] for name in names if name in lower), None)


def _check(found: UrlList, columns: Sequence[str], chosen: Columns) -> None:
    absent = [name for name in (chosen.url, chosen.caption, *chosen.kept) if name not in columns]
    if absent:
        raise ConfigError(
            f"{found.path}: no column {absent[0]!r} (found: {', '.join(columns)})", "name one that exists"
        )
    reserved = [name for name in chosen.kept if name in RESERVED]
    if reserved:
        raise ConfigError(
            f"the column {reserved[0]!r} cannot be kept under its name, which img2dataset uses itself",
            "leave it out, or rename it in the list",
        )
    for own, name in (("url", chosen.url), ("caption", chosen.caption)):
        if own in columns and name != own and found.kind != "parquet":
            raise ConfigError(
                f"{found.path}: img2dataset renames {name!r} to {own!r}, and there is such a column already",
                f"rename or remove the column {own!r} of the list",
            )
