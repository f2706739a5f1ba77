"""Which layout a path holds, and its reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from clipkit.data.making.collection import Collection, Found, Reading, collect
from clipkit.data.making.folders import holds_pairs, read_pairs
from clipkit.data.making.tables import TABLE_SUFFIXES, read_table
from clipkit.data.tables import table_suffix
from clipkit.types import ConfigError

Reader = Callable[[Path, Reading], Found]

READERS: dict[str, Reader] = {
    "table": read_table,
    "pairs": read_pairs,
}


def open_collection(
    path: str | Path, reading: Reading | None = None, kind: str | None = None, folder: Path | None = None
) -> Collection:
    """Returns the images and captions that a path holds, listed.

    kind: the layout, found out when None. folder: where the listing lies while this process needs it, by
    default the system's folder of temporary files. ConfigError for a path that holds nothing known,
    DataError for damaged content.
    """
    given, reading = Path(path).expanduser(), reading or Reading()
    layout, place = (kind, given) if kind is not None else detect(given)
    if kind == "table":
        place = the_table(given)
    return collect(str(path), READERS[layout](place, reading), reading, folder)


def detect(path: Path) -> tuple[str, Path]:
    """Returns the layout of a path, and the file or folder to read: of a folder with one table, the table."""
    if path.is_file():
        if table_suffix(path) in TABLE_SUFFIXES:
            return "table", path
        raise ConfigError(f"{path}: a file of no known layout", f"give one of {' '.join(TABLE_SUFFIXES)}")
    if not path.is_dir():
        raise ConfigError(f"{path}: no such table", "give a CSV or TSV file, or a folder")
    if not tables_in(path) and holds_pairs(path):
        return "pairs", path
    return "table", the_table(path)


def tables_in(folder: Path) -> list[Path]:
    """Returns the tables that lie in a folder itself, by name."""
    return sorted(
        path for path in folder.iterdir() if table_suffix(path) in TABLE_SUFFIXES and path.is_file()
    )


def the_table(given: Path) -> Path:
    """Returns the table itself, or the only one in a folder. Raises ConfigError."""
    if not given.is_dir():
        return given
    tables = tables_in(given)
    if len(tables) == 1:
        return tables[0]
    found = f"{len(tables)} tables ({', '.join(path.name for path in tables[:3])})" if tables else "no table"
    raise ConfigError(
        f"{given}: a folder of images needs a table of their captions, it holds {found}",
        "give the CSV or TSV file, or pass --to evaluation",
    )
