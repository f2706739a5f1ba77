"""Which layout a path holds, and its reader."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from clipkit.data.making.annotations import is_flickr, is_header, read_annotations, read_flickr
from clipkit.data.making.collection import Collection, Found, Reading, collect
from clipkit.data.making.folders import holds_pairs, is_image, read_pairs, walk_files
from clipkit.data.making.huggingface import is_saved, read_huggingface
from clipkit.data.making.tables import (
    IMAGE_COLUMNS,
    TABLE_SUFFIXES,
    read_table,
)
from clipkit.data.parquet import PARQUET_SUFFIXES
from clipkit.data.tables import CAPTION_COLUMNS, UNREADABLE_TABLE, open_table, read_columns, table_suffix
from clipkit.types import ConfigError, DataError

Reader = Callable[[Path, Reading], Found]

READERS: dict[str, Reader] = {
    "table": read_table,
    "pairs": read_pairs,
    "coco": read_annotations,
    "karpathy": read_annotations,
    "flickr": read_flickr,
    "huggingface": read_huggingface,
}
# Layouts of labelled images, whose readers are those of the evaluation commands.
LABELLED = ("labels", "imagefolder", "idx")
_IDX = re.compile(r"images[-.]idx3-ubyte(\.gz)?$")


def open_collection(
    path: str | Path,
    reading: Reading | None = None,
    kind: str | None = None,
    folder: Path | None = None,
    labelled: Mapping[str, Reader] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Collection:
    """Returns the images and captions that a path holds, listed.

    kind: the layout, found out when None. folder: where the listing lies while this process needs it, by
    default the system's folder of temporary files. labelled: readers of LABELLED layouts
    (`clipkit.evaluation.collections.READERS`). progress: told of further entries as they are listed.
    Raises ConfigError for a path that holds nothing known, DataError for damaged content.
    """
    given, reading = Path(path).expanduser(), reading or Reading()
    readers = {**READERS, **(labelled or {})}
    if kind not in (None, *readers):
        raise ConfigError(f"no layout is called {kind!r}", f"choose one of {', '.join(readers)}")
    if kind is None:
        kind, given = detect(given, reading)
    elif kind != "huggingface" and not given.exists():
        raise ConfigError(f"{given}: no such file or folder", "correct the path")
    elif kind in ("table", "labels"):
        given = the_table(given, reading)
    if kind not in readers:
        raise ConfigError(f"{given}: labelled images ({kind}) have no captions", "give images with captions")
    return collect(str(path), readers[kind](given, reading), reading, folder, progress)


def detect(path: Path, reading: Reading) -> tuple[str, Path]:
    """Returns the layout of a path, and the file or folder to read: of a folder with one table, the table."""
    if path.is_file():
        return _file_layout(path, reading), path
    if not path.is_dir():
        raise ConfigError(
            f"{path}: no such table or folder", "correct the path; names on the hub need --from huggingface"
        )
    if is_saved(path):
        return "huggingface", path
    if any(_IDX.search(entry.name) for entry in path.iterdir()):
        return "idx", path
    if (path / "test" / "nshards.txt").is_file() or (path / "sizes.json").is_file():
        raise ConfigError(f"{path}: holds shards already", "train on the folder as it is")
    if not tables_in(path):
        if holds_pairs(path):
            return "pairs", path
        if _holds_classes(path):
            return "imagefolder", path
    table = the_table(path, reading)
    return _file_layout(table, reading), table


def _file_layout(path: Path, reading: Reading) -> str:
    suffix = table_suffix(path)
    if suffix in PARQUET_SUFFIXES:
        return "table"
    if suffix == ".json":
        return "coco"
    if _IDX.search(path.name):
        return "idx"
    try:
        with open_table(path) as stream:
            line = stream.readline(1 << 16).rstrip("\r\n")
    except UNREADABLE_TABLE as error:
        raise DataError(f"{path}: cannot be read ({error})", "save it as UTF-8 text") from error
    if is_flickr(line) or (suffix == ".txt" and is_header(line)):
        return "flickr"
    if suffix not in TABLE_SUFFIXES:
        raise ConfigError(
            f"{path}: a file of no known layout",
            f"give one of {' '.join(TABLE_SUFFIXES)} .json, or name the layout with --from",
        )
    columns = read_columns(path)
    captions = reading.captions or any(name in columns for name in CAPTION_COLUMNS)
    plain = path.suffix.lower() != ".gz"
    if "label" in columns and plain and (reading.labels_first or not captions):
        return "labels"
    return "table"


def tables_in(folder: Path) -> list[Path]:
    """Returns the tables that lie in a folder itself, by name."""
    return sorted(
        path for path in folder.iterdir() if table_suffix(path) in TABLE_SUFFIXES and path.is_file()
    )


def _holds_classes(folder: Path) -> bool:
    """Returns whether the images of a folder lie in its sub-folders."""
    found = [relative for relative, files in walk_files(folder) if any(map(is_image, files))]
    return bool(found) and "" not in found


def the_table(given: Path, reading: Reading) -> Path:
    """Returns the table itself, or the only one in a folder that has images with captions or labels.

    Raises ConfigError.
    """
    if not given.is_dir():
        return given
    tables = tables_in(given)
    fitting = [table for table in tables if _fits(table, reading)] if len(tables) > 1 else tables
    if len(fitting) == 1:
        return fitting[0]
    found = f"{len(tables)} tables ({', '.join(path.name for path in tables[:3])})" if tables else "no table"
    raise ConfigError(
        f"{given}: a folder of images needs a table of their captions, it holds {found}",
        "give the table itself, put NAME.txt beside each NAME.jpg, or one folder per class",
    )


def _fits(table: Path, reading: Reading) -> bool:
    if table.suffix.lower() in PARQUET_SUFFIXES:
        return True
    columns = read_columns(table)
    images = (reading.image_key,) if reading.image_key else IMAGE_COLUMNS
    texts = reading.captions or ("label", *CAPTION_COLUMNS)
    return any(name in columns for name in images) and any(name in columns for name in texts)
