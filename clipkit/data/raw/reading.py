"""What raw data is, how it is read, and what it counts by."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipkit.data.making import Reading
from clipkit.data.making.collection import LIST, Found
from clipkit.data.making.folders import IMAGE_SUFFIXES, TEXT_SUFFIX, walk_files
from clipkit.data.making.opening import READERS, detect
from clipkit.data.making.tables import TABLE_SUFFIXES, choose_columns, read_table
from clipkit.data.options import Source
from clipkit.data.source import scheme_of
from clipkit.data.tables import ImageRoot, table_suffix
from clipkit.types import ConfigError, DataError

FOUND = "txt"  # in the place of a column: the captions as they are found
_LOOK = 1000  # entries that tell whether samples have several captions
CAPTIONS = f"json.{LIST}"  # where a sample's captions are listed
_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Raw:
    """Raw data as a configuration names it.

    path        the table or folder
    image_root  folder or zip of a table's images; None: beside the table
    image_key   a table's column of image paths, None: the first known name
    captions    a table's caption columns; `txt` alone: the captions as they are found there
    """

    path: Path
    image_root: Path | None = None
    image_key: str | None = None
    captions: tuple[str, ...] = (FOUND,)


def raw_path(shards: str | Sequence[str]) -> Path | None:
    """Returns the table or folder that `shards` names when it is raw data, None when it names shards.

    Raises ConfigError for tables elsewhere and for several, DataError for a folder that cannot be read.
    """
    names = [shards] if isinstance(shards, str) else list(shards)
    tables = [name for name in names if table_suffix(Path(name.partition("?")[0])) in TABLE_SUFFIXES]
    if tables and len(names) > 1:
        raise ConfigError(
            f"data.train has {tables[0]!r} in a list of shards",
            "give every table an entry of its own in data.train",
        )
    if len(names) > 1 or scheme_of(names[0]):
        if tables:
            raise ConfigError(
                f"data.train names a table on another machine: {tables[0]!r}", "copy it here with its images"
            )
        return None
    path = Path(names[0])
    if table_suffix(path) in TABLE_SUFFIXES:
        return path
    try:
        if path.is_dir() and not any(name.lower().endswith(_TAR_ENDINGS) for name in os.listdir(path)):
            return path
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", "check its permissions") from error
    return None


def raw_of(source: Source, path: Path) -> Raw:
    """Returns the raw data at `path` as a source names it; ConfigError for `lines`, which are for shards."""
    if any(caption.lines for caption in source.captions):
        raise ConfigError(
            f"data.train has captions with `lines: true` in {path}, which holds no shards",
            "leave `lines` out: every line of the .txt of a pair is a caption as it is, and several captions "
            "of a table stand in columns or lists of their own",
        )
    root = None if source.image_root is None else Path(source.image_root)
    names = tuple(caption.field.removeprefix("json.") for caption in source.captions)
    return Raw(path, root, source.image_key, names)


@dataclass(frozen=True)
class Plan:
    """The table or folder itself, what its reader found, and the fields that captions become."""

    place: Path
    found: Found
    reading: Reading
    fields: tuple[str, ...]


def planned(raw: Raw) -> Plan:
    """Returns how raw data is read. ConfigError and DataError for what is not there or not known."""
    named = tuple(name for name in raw.captions if name != FOUND)
    asked = Reading(
        images=raw.image_root,
        image_key=raw.image_key,
        captions=named if FOUND not in raw.captions else (),
    )
    layout, place = _layout(raw.path, asked)
    if layout == "pairs":
        if named:
            raise ConfigError(
                f"{raw.path}: captions name {', '.join(named)}, and a folder of pairs has no columns",
                "write `field: txt`, or leave captions out",
            )
        return Plan(place, READERS[layout](place, asked), asked, (CAPTIONS,))
    return _planned_table(raw, asked, place, named)


def _layout(path: Path, asked: Reading) -> tuple[str, Path]:
    """Whether a path holds a table or pairs, and the table itself."""
    try:
        layout, place = detect(path, asked)
    except ConfigError as error:
        if not path.is_dir():
            raise
        raise ConfigError(
            f"{error.cause}, and no .tar file either",
            "name the table itself, or the folder that holds the shards",
        ) from error
    if layout not in ("table", "pairs"):
        raise ConfigError(
            f"{path}: its layout ({layout}) is not trained on as it is",
            f"make shards once, `clipkit data make-shards {path} --out SHARDS`, and name those",
        )
    return layout, place


def _planned_table(raw: Raw, asked: Reading, place: Path, named: tuple[str, ...]) -> Plan:
    found = read_table(place, asked)
    _, first = choose_columns(str(place), found.fields, asked)
    if FOUND in raw.captions:
        first = (FOUND,) if FOUND in found.fields and named else first
        columns = tuple(dict.fromkeys((*first, *named)))
    else:
        columns = named
    if len(columns) < len(raw.captions):
        raise ConfigError(
            f"{raw.path}: two caption fields mean one column ({', '.join(columns)} in all)",
            "name every column once; txt means the captions as found",
        )
    reading = replace(asked, captions=columns)
    found = read_table(place, reading)
    for name in columns if len(columns) > 1 else ():
        if name not in found.kept or "." in name:
            raise ConfigError(
                f"{raw.path}: column {name!r} cannot be one of several caption fields",
                "rename it: the fields of JSON have names without dots, and `captions` is taken",
            )
    if len(columns) == 1:
        several = found.grouped or any(
            len(entry.captions) > 1 for entry in itertools.islice(found.entries(), _LOOK)
        )
        fields: tuple[str, ...] = (CAPTIONS if several else FOUND,)
    else:
        fields = tuple(f"json.{first[0] if name == FOUND else name}" for name in raw.captions)
    return Plan(place, found, reading, fields)


def describe(raw: Raw, plan: Plan) -> tuple[dict[str, Any], int]:
    """Returns (everything that the shards are made from, JSON-able; bytes of the images).

    A table counts by its content, files by name, size and time of change: images that were replaced under
    the same name are noticed without reading them.
    """
    found, place = plan.found, plan.place
    facts: dict[str, Any] = {"kind": found.kind}
    if place.is_dir():
        facts["files"], volume = _hashed(_tree(place, found.kind == "pairs"))
        return facts, volume
    try:
        with place.open("rb") as stream:
            facts["table"] = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{place}: cannot be read ({error.strerror})", "check the path") from error
    facts |= {"image_key": raw.image_key, "captions": raw.captions}
    volume = place.stat().st_size
    if isinstance(found.images, ImageRoot):
        root = found.images.path
        names = (entry.image for entry in found.entries()) if root.is_dir() else iter([""])
        facts["images"], volume = _hashed((name, root / name) for name in names)
    return facts, volume


def _tree(folder: Path, pairs: bool) -> Iterator[tuple[str, Path]]:
    for relative, files in walk_files(folder):
        for name in files:
            if not pairs or name.lower().endswith((*IMAGE_SUFFIXES, TEXT_SUFFIX)):
                yield os.path.join(relative, name), folder / relative / name


def _hashed(files: Iterator[tuple[str, Path]]) -> tuple[str, int]:
    """The hash of names, sizes and times of files, and their bytes; absent ones count as such."""
    state, volume = hashlib.blake2b(digest_size=16), 0
    for name, path in files:
        try:
            status = os.stat(path)
            volume += status.st_size
            line = f"{name}\0{status.st_size} {status.st_mtime_ns}\n"
        except (OSError, ValueError):  # ValueError: a name with a NUL character; both are rejects later
            line = f"{name}\0absent\n"
        state.update(line.encode("utf-8", "surrogatepass"))
    return state.hexdigest(), volume
