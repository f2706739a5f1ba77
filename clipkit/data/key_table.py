"""Tables looked up by key with little memory: sorted hashes and offsets in files, rows read on demand."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipkit.data.buckets import Buckets
from clipkit.data.parquet import PARQUET_SUFFIXES, opened_parquet
from clipkit.data.query import value_text
from clipkit.data.tables import jsonable, read_columns, stream_rows, table_suffix
from clipkit.data.tar_index import replacing
from clipkit.types import ConfigError, DataError

KEY_COLUMNS = ("key", "uid")
SHARD_COLUMN = "shard"
_TEXT = (".csv", ".tsv", ".tab")
_BATCH = 4096
_BLOCK = 1 << 18  # rows in memory at a time
_BUCKET_BYTES = 32 << 20  # of entries that are sorted at a time
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d+)?([eE][+-]?\d{1,3})?")
_CURE = "choose columns with --columns and the key column with --key"

HASH = np.dtype("<u8")
PLACE = np.dtype([("begin", "<i8"), ("size", "<u4")])
ENTRY = np.dtype([("hash", HASH), ("begin", "<i8"), ("size", "<u4")])


def text_hash(text: str) -> int:
    """Returns 64 bits of a text (blake2b); half surrogates, which JSON can hold, count as they are."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def shard_key(shard: str, key: str) -> str:
    """Returns what stands for a sample where keys of different shards repeat: the name of its shard, or the
    path, which may be relative, and its key.
    """
    return f"{os.path.abspath(shard) if os.sep in shard else shard}\n{key}"


class TableSpec(NamedTuple):
    """What of a table is used: its key column (None: `key`, else `uid`) and columns (None: all others).

    by_shard   a column `shard` beside `key` is part of the keys: see `shard_key`
    """

    path: Path
    key: str | None = None
    columns: tuple[str, ...] | None = None
    by_shard: bool = False

    def resolved(self) -> TableSpec:
        """Returns it with the columns named; DataError for what is not a table, ConfigError for a column
        that is not there.
        """
        found = _columns(self.path)
        key = self.key or next((name for name in KEY_COLUMNS if name in found), None)
        if key is None:
            raise ConfigError(
                f"{self.path}: no column 'key' or 'uid' (found: {', '.join(found) or 'nothing'})",
                "name the column that holds the keys with --key",
            )
        columns = tuple(name for name in found if name != key) if self.columns is None else self.columns
        for name in (key, *columns):
            if name not in found:
                raise ConfigError(
                    f"{self.path}: no column {name!r} (found: {', '.join(found) or 'nothing'})", _CURE
                )
        return TableSpec(
            self.path, key, columns, self.by_shard and key == KEY_COLUMNS[0] and SHARD_COLUMN in found
        )


class KeyTable:
    """Rows of a table by key, in files named `stem`; only what is asked for is read. A key has one row.

    A key costs 20 bytes of disk, mapped and so shared by all processes, besides its row. Picklable: files
    open on first use.
    """

    def __init__(self, stem: Path) -> None:
        self.stem = stem

    def __reduce__(self) -> tuple[Any, ...]:
        return KeyTable, (self.stem,)

    def __len__(self) -> int:
        return len(self._hashes)

    def locate(self, key: str) -> int | None:
        """Returns the number of a key among all, by their hashes; None when it is not there."""
        wanted = np.uint64(text_hash(key))
        at = int(np.searchsorted(self._hashes, wanted))
        while at < len(self._hashes) and self._hashes[at] == wanted:
            if self._row(at)[0] == key:
                return at
            at += 1
        return None

    def find(self, key: str) -> dict[str, Any] | None:
        """Returns the row of a key as {column: value}, None when there is none."""
        at = self.locate(key)
        return None if at is None else self.row(at)

    def __contains__(self, key: str) -> bool:
        return self.locate(key) is not None

    def row(self, at: int) -> dict[str, Any]:
        """Returns row number `at` as {column: value}."""
        row = {}
        _, *values = self._row(at)
        for name, numeric, value in zip(self._facts["columns"], self._facts["numeric"], values, strict=True):
            row[name] = (json.loads(value) if value else None) if numeric else value
        return row

    def first_keys(self, rows: NDArray[np.int64], most: int) -> list[tuple[int, str]]:
        """Returns place and text of the keys of these rows, the first `most` as the table has them."""
        begins = np.asarray(self._places["begin"][rows])
        order = np.argpartition(begins, most)[:most] if len(rows) > most else np.arange(len(rows))
        return sorted((int(begins[at]), self._row(int(rows[at]))[0].replace("\n", ", ")) for at in order)

    def _row(self, at: int) -> list[Any]:
        return _read_row(self._rows, self._places[at])

    @property
    def by_shard(self) -> bool:
        """Whether its keys are those of `shard_key`."""
        return bool(self._facts["by_shard"])

    @cached_property
    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(_part(self.stem, "json").read_bytes())
        return facts

    @cached_property
    def _hashes(self) -> NDArray[np.uint64]:
        return np.memmap(_part(self.stem, "hashes"), HASH, mode="r")

    @cached_property
    def _places(self) -> NDArray[Any]:
        return np.memmap(_part(self.stem, "places"), PLACE, mode="r")

    @cached_property
    def _rows(self) -> int:
        return os.open(_part(self.stem, "rows"), os.O_RDONLY)

    def __del__(self) -> None:
        if "_rows" in self.__dict__:
            os.close(self._rows)


def build_key_table(
    spec: TableSpec, stem: Path, unique: bool, on_rows: Callable[[int], None] | None = None
) -> KeyTable:
    """Writes the files of a key table and returns it; those that are there already are kept.

    Numbers of a CSV, of columns that hold nothing else, become numbers. unique: a key on two rows is a
    DataError; without it the first one counts. `on_rows` gets the number of rows read. Memory does not grow
    with the table: what is sorted lies in files.
    """
    if _part(stem, "json").is_file():
        return KeyTable(stem)
    spec = spec.resolved()
    # In a folder of its own: machines that share a job may be here at once.
    with tempfile.TemporaryDirectory(prefix=f"{stem.name}-", dir=stem.parent) as folder:
        unsorted = Path(folder) / "entries"
        numeric = _write_rows(spec, stem, unsorted, on_rows)
        _write_sorted(spec, stem, unsorted, unique)
    facts = {"columns": spec.columns, "numeric": numeric, "by_shard": spec.by_shard}
    with replacing(_part(stem, "json")) as out:
        out.write(json.dumps(facts).encode())
    return KeyTable(stem)


def _write_rows(
    spec: TableSpec, stem: Path, unsorted: Path, on_rows: Callable[[int], None] | None
) -> list[bool]:
    """Writes the rows, and an ENTRY of each in their order; returns which columns hold numbers."""
    numeric = [_suffix(spec.path) in _TEXT] * len(spec.columns or ())
    entries: list[tuple[int, int, int]] = []
    count = 0
    with replacing(_part(stem, "rows")) as out, unsorted.open("wb") as known:
        for key, *values in _rows(spec):
            if spec.by_shard:
                key = shard_key(value_text(values.pop(0)), key)
            # A number for as long as every filled cell is one: product codes such as 00123 stay text.
            for at, value in enumerate(values):
                if numeric[at] and value and not _is_number(value):
                    numeric[at] = False
            line = json.dumps([key, *values], ensure_ascii=True).encode() + b"\n"
            entries.append((text_hash(key), out.tell(), len(line)))
            out.write(line)
            if len(entries) == _BATCH:
                known.write(np.array(entries, ENTRY).tobytes())
                count += len(entries)
                entries.clear()
                if on_rows is not None:
                    on_rows(count)
        known.write(np.array(entries, ENTRY).tobytes())
    return numeric


def _write_sorted(spec: TableSpec, stem: Path, unsorted: Path, unique: bool) -> None:
    """Writes hashes and places by hash, the first row of every key; DataError for a later one if `unique`."""
    count = unsorted.stat().st_size // ENTRY.itemsize
    with (
        Buckets(unsorted.parent, ENTRY, count, _BUCKET_BYTES) as buckets,
        unsorted.open("rb") as known,
        _part(stem, "rows").open("rb") as rows,
        replacing(_part(stem, "hashes")) as hashes,
        replacing(_part(stem, "places")) as places,
    ):
        while len(entries := np.fromfile(known, ENTRY, _BLOCK)):
            buckets.add(entries["hash"], entries)
        for entries in buckets:
            # Stable: rows of one key in the order of the table.
            entries = entries[np.argsort(entries["hash"], kind="stable")]
            repeated = []
            for at, key in _repeated(entries, rows.fileno()):
                if unique:
                    raise DataError(
                        f"{spec.path}: the key {key!r} stands on two rows", "leave one row per key"
                    )
                repeated.append(at)
            entries = np.delete(entries, repeated)
            hashes.write(entries["hash"].astype(HASH).tobytes())
            places.write(entries[list(PLACE.names or ())].astype(PLACE).tobytes())


def _repeated(entries: NDArray[Any], rows: int) -> Iterator[tuple[int, str]]:
    """Yields the places of sorted entries whose key stands before them, and the key."""
    seen: set[str] = set()
    last = -1
    for at in (np.flatnonzero(entries["hash"][1:] == entries["hash"][:-1]) + 1).tolist():
        if at - 1 != last:
            seen = {_read_row(rows, entries[at - 1])[0]}
        last = at
        key = _read_row(rows, entries[at])[0]
        if key in seen:
            yield at, key
        seen.add(key)


def _read_row(rows: int, place: Any) -> list[Any]:
    row: list[Any] = json.loads(os.pread(rows, int(place["size"]), int(place["begin"])))
    return row


def _is_number(text: str) -> bool:
    """Whether a cell is a number that JSON can hold: 1e999 would become Infinity."""
    return _NUMBER.fullmatch(text) is not None and math.isfinite(float(text))


def _part(stem: Path, name: str) -> Path:
    return stem.with_name(f"{stem.name}.{name}")


def _suffix(path: Path) -> str:
    suffix = table_suffix(path)
    if suffix not in (*_TEXT, *PARQUET_SUFFIXES):
        raise ConfigError(f"{path}: not a table by its name", "give a .csv, .tsv or .parquet file")
    return suffix


def _columns(path: Path) -> list[str]:
    if _suffix(path) in _TEXT:
        return read_columns(path)
    with opened_parquet(path) as file:
        return list(file.schema_arrow.names)


def _rows(spec: TableSpec) -> Iterator[tuple[Any, ...]]:
    """Yields (key, with `by_shard` the shard, values of the columns) of every row."""
    assert spec.key is not None
    names = (spec.key, *([SHARD_COLUMN] if spec.by_shard else []), *(spec.columns or ()))
    if _suffix(spec.path) in _TEXT:
        for row in stream_rows(spec.path, names, _CURE):
            yield tuple(row[name] for name in names)
        return
    empty = True
    with opened_parquet(spec.path) as file:
        for batch in file.iter_batches(batch_size=_BATCH, columns=list(names)):
            columns = [batch.column(name).to_pylist() for name in names]
            for key, *values in zip(*columns, strict=True):
                empty = False
                yield (value_text(jsonable(key)), *(jsonable(value) for value in values))
    if empty:
        raise DataError(f"{spec.path}: no rows", "give a table with a row per key")
