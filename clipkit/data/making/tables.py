"""Tables with a row per image or caption: CSV and TSV, packed by gzip or not, and Parquet."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from clipkit.data.making.collection import LIST, Entry, Found, Images, Reading, refuse_splits
from clipkit.data.parquet import PARQUET_SUFFIXES, ColumnCells, opened_parquet
from clipkit.data.tables import (
    CAPTION_COLUMNS,
    TAB_SUFFIXES,
    find_root,
    jsonable,
    read_columns,
    refuse_nameless,
    stream_rows,
    table_suffix,
)
from clipkit.types import DataError

TABLE_SUFFIXES = (".csv", *TAB_SUFFIXES, ".parquet", ".pq")
# Names that others give to columns of images, the most telling first.
IMAGE_COLUMNS = ("filepath", "file_name", "filename", "image_path", "image", "path", "file", "img", "jpg")
DEFAULT_TEMPLATES = ("a photo of a {c}",)
_NAMED = 8  # columns that are named to people
_CURE = "name the columns with --image-key, --caption-key and --keep"


def read_table(table: Path, reading: Reading) -> Found:
    """Returns the rows of a table. ConfigError or DataError for columns that are not there."""
    refuse_splits(table, reading)
    if table.suffix.lower() in PARQUET_SUFFIXES:
        return _read_parquet(table, reading)
    columns = read_columns(table)
    refuse_nameless(table, columns)
    image, captions = choose_columns(str(table), columns, reading)
    kept = kept_columns(columns, image, captions, reading)

    def entries() -> Iterator[Entry]:
        rows = stream_rows(table, (image, *captions, *kept), _CURE)
        for number, row in enumerate(rows):
            fields = {name: row[name] for name in kept}
            yield checked(Entry(number, row[image], tuple(row[name] for name in captions), None, fields))

    return Found(
        kind="tsv" if table_suffix(table) in TAB_SUFFIXES else "csv",
        images=table_images(table, reading.images, entries),
        entries=entries,
        fields=tuple(columns),
        kept=kept,
        used=columns_used(image, captions, kept),
    )


def columns_used(image: str, captions: Sequence[str], kept: Sequence[str]) -> str:
    """Returns what was taken for what, in words."""
    fields = [name for name in kept if name not in captions]
    more = f" and {len(fields) - _NAMED} more" if len(fields) > _NAMED else ""
    stored = f", as fields {', '.join(fields[:_NAMED])}{more}" if fields else ""
    return f"images in column {image}, captions in {', '.join(captions)}{stored}"


def kept_columns(
    columns: Sequence[str],
    image: str,
    captions: Sequence[str],
    reading: Reading,
    not_for_json: Container[str] = (),
) -> tuple[str, ...]:
    """Returns the columns that are stored as fields: those asked for, or all but image and only caption.

    Of several captions each is a field, too: only so can one of them be chosen later.
    """
    if reading.keep is not None:
        return reading.keep
    apart = {image, LIST, *(captions if len(captions) == 1 else ())}
    return tuple(name for name in dict.fromkeys(columns) if name not in apart and name not in not_for_json)


def choose_columns(source: str, columns: Sequence[str], reading: Reading) -> tuple[str, tuple[str, ...]]:
    """Returns the column of images and those of captions: the ones asked for, else the first known name."""
    for name in (
        *([reading.image_key] if reading.image_key else []),
        *reading.captions,
        *(reading.keep or ()),
    ):
        if name not in columns:
            found = ", ".join(columns) or "nothing"
            raise DataError(f"{source}: no column '{name}' (found: {found})", _CURE)
    image = reading.image_key or next((name for name in IMAGE_COLUMNS if name in columns), None)
    captions = reading.captions or tuple(name for name in CAPTION_COLUMNS if name in columns)[:1]
    if image is None or not captions:
        what = "images" if image is None else "captions"
        found = ", ".join(columns) or "nothing"
        # Spreadsheets write semicolons where the comma is the decimal sign.
        joined = len(columns) == 1 and any(sign in columns[0] for sign in ";\t|")
        raise DataError(
            f"{source}: no column of {what} is known by its name (found: {found})",
            "separate the columns by commas, or by tabs in a file named .tsv" if joined else _CURE,
        )
    return image, captions


def table_images(table: Path, given: Path | None, entries: Callable[[], Iterable[Entry]]) -> Images:
    """Returns where the images of a table lie."""
    first = next(iter(entries()), None)
    return find_root(table, given, "" if first is None else first.image)


def checked(entry: Entry) -> Entry:
    """Returns the entry, with its problem when its image has no name or one that leads out of the root.

    An absolute name is taken as it is: whoever writes one means it.
    """
    if entry.problem is None:
        if not entry.image.strip():
            return entry._replace(problem=("missing image", "the row names none"))
        depth = 0
        for part in PurePosixPath(entry.image.replace("\\", "/")).parts:
            depth += {"..": -1, ".": 0}.get(part, 1)
            if depth < 0:
                return entry._replace(
                    problem=("outside the image folder", "give the folder above as --images")
                )
    return entry


def with_templates(entry: Entry, label: Any, names: Sequence[str], templates: Sequence[str] | None) -> Entry:
    """Returns the entry with its class, and the captions that templates make of its name."""
    if not isinstance(label, int) or not 0 <= label < len(names):
        return entry._replace(problem=("no such class", f"label {label!r} of {len(names)} classes"))
    texts = tuple(
        template.replace("{c}", names[label]).replace("{}", names[label])
        for template in templates or DEFAULT_TEMPLATES
    )
    return entry._replace(label=label, captions=texts)


def caption_texts(values: Iterable[Any]) -> tuple[str, ...]:
    """Returns the captions in cells that hold one, several in a list, or none."""
    texts: list[str] = []
    for value in values:
        texts += (
            caption_texts(value) if isinstance(value, list | tuple) else [] if value is None else [str(value)]
        )
    return tuple(texts)


def _read_parquet(table: Path, reading: Reading) -> Found:
    with opened_parquet(table) as file:
        schema = file.schema_arrow
    image, captions = choose_columns(str(table), schema.names, reading)
    kind = schema.field(image).type
    inside = str(kind) in ("binary", "large_binary") or str(kind).startswith("struct<")
    bytes_columns = {column.name for column in schema if "binary" in str(column.type)}
    kept = kept_columns(schema.names, image, captions, reading, bytes_columns)
    columns = [*dict.fromkeys((*([] if inside else [image]), *captions, *kept))]

    def entries() -> Iterator[Entry]:
        for number, row in enumerate(_parquet_rows(table, columns)):
            name = str(number) if inside else str(row[image] or "")
            fields = {key: jsonable(row[key]) for key in kept}
            entry = Entry(number, name, caption_texts(row[key] for key in captions), None, fields)
            yield entry if inside else checked(entry)

    images = ParquetImages(table, image) if inside else table_images(table, reading.images, entries)
    return Found("parquet", images, entries, tuple(schema.names), kept, columns_used(image, captions, kept))


def _parquet_rows(table: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    with opened_parquet(table) as file:
        for batch in file.iter_batches(1024, columns=columns):
            yield from batch.to_pylist()


@dataclass(frozen=True)
class ParquetImages:
    """Images inside a Parquet column, as bytes or as struct<bytes, path>; an image is known by its row."""

    table: Path
    column: str

    def read(self, image: str, size: int = -1) -> bytes:
        """Returns the first `size` bytes of an image (all by default); OSError or ValueError."""
        status = os.stat(self.table)
        value = _cells(self.table, self.column, (status.st_size, status.st_mtime_ns)).at(int(image))
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ValueError("the cell holds no bytes")
        return content if size < 0 else content[:size]


@lru_cache(1)
def _cells(table: Path, column: str, stamp: tuple[int, int]) -> ColumnCells:
    """The cells that this process reads, part after part: what lies between them is passed once."""
    return ColumnCells(table, column)
