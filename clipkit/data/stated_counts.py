"""What others say about the number of samples in shards: sizes.json, and img2dataset's NAME_stats.json."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from clipkit.data.http_ranges import Transient
from clipkit.data.options import Storage
from clipkit.data.remote import RemoteShards
from clipkit.data.source import is_remote
from clipkit.types import DataError

MAX_BYTES = 64 << 20
_ABSENT = (OSError, ValueError, RecursionError, DataError, Transient)


def count_warnings(shards: Sequence[str], counts: Sequence[int], storage: Storage) -> Iterator[str]:
    """Yields a line for every shard whose walked count is not the one that a file beside it states."""
    for (shard, stated), count in zip(stated_counts(shards, storage), counts, strict=True):
        for file, number in stated.items():
            if number != count:
                yield f"{shard}: {count} samples were found, {file} states {number}"


def stated_counts(shards: Sequence[str], storage: Storage) -> Iterator[tuple[str, dict[str, int]]]:
    """Yields every shard with the counts that files beside it state, by file name.

    Read are sizes.json of each folder ({name: samples}) and, of local shards, NAME_stats.json ("successes").
    """
    sizes: dict[str, Any] = {}
    for shard in shards:
        folder, name = _split(shard)
        if folder not in sizes:
            sizes[folder] = _read(_beside(shard, "sizes.json"), storage)
        stated = {"sizes.json": sizes[folder].get(name)}
        if not is_remote(shard):
            file = f"{os.path.splitext(name)[0]}_stats.json"
            stated[file] = _read(_beside(shard, file), storage).get("successes")
        yield shard, {file: number for file, number in stated.items() if isinstance(number, int)}


def _split(shard: str) -> tuple[str, str]:
    if not is_remote(shard):
        return os.path.split(shard)
    return posixpath.split(shard.partition("?")[0])


def _beside(shard: str, name: str) -> str:
    if not is_remote(shard):
        return os.path.join(os.path.dirname(shard), name)
    parts = urlsplit(shard)
    return urlunsplit(parts._replace(path=posixpath.join(posixpath.dirname(parts.path), name)))


def _read(path: str, storage: Storage) -> dict[str, Any]:
    """The JSON object in a file; an empty one for whatever is not there or not that."""
    try:
        if is_remote(path):
            source = RemoteShards(storage)
            try:
                with source.whole(path) as stream:
                    found = json.loads(stream.read(MAX_BYTES))
            finally:
                source.close()
        else:
            found = json.loads(Path(path).read_bytes())
    except _ABSENT:
        return {}
    return found if isinstance(found, dict) else {}
