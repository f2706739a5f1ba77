"""Size and stamp of every shard of a set: whether an index still describes it."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clipkit.data.http_ranges import NoRanges
from clipkit.data.options import DEFAULT_STORAGE, Storage
from clipkit.data.remote import RemoteShards
from clipkit.data.source import is_remote
from clipkit.redaction import redact
from clipkit.types import DataError

REQUESTS_AT_ONCE = 16
_ENOUGH_PROBLEMS = 5  # each may have cost a minute of attempts

Fingerprint = tuple[int, int]
"""Size in bytes; modification time in ns, or of a remote shard its stamp."""


def fingerprints(shards: Sequence[str], storage: Storage) -> list[Fingerprint]:
    """Returns (size, stamp) of every shard, of remote ones with one small request each.

    Raises DataError listing the shards that cannot be read, NoRanges for a server without ranges.
    """
    found: dict[str, Fingerprint] = {}
    problems: list[str] = []
    for shard in shards:
        if not is_remote(shard):
            fact = _local(shard)
            if isinstance(fact, str):
                problems.append(fact)
            else:
                found[shard] = fact
    remote = [shard for shard in shards if is_remote(shard)]
    asking = min(REQUESTS_AT_ONCE, len(remote))

    def ask(first: int) -> None:
        source = RemoteShards(storage)
        try:
            for shard in remote[first::asking]:
                if len(problems) >= _ENOUGH_PROBLEMS:
                    return
                try:
                    found[shard] = source.facts(shard)
                except NoRanges:
                    raise
                except DataError as error:
                    problems.append(error.cause)
        finally:
            source.close()

    if asking and not problems:
        with ThreadPoolExecutor(asking) as pool:
            list(pool.map(ask, range(asking)))
    if problems:
        first = ", ".join(problems[:5])
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError(
            f"{len(problems)} of {len(shards)} shards cannot be read: {first}{more}",
            "correct the list of shards, or bring them back",
        )
    return [found[shard] for shard in shards]


def shard_inputs(shards: Sequence[str]) -> list[list[Any]]:
    """Returns [name, size, stamp] of every shard, as a job describes its inputs; errors as above."""
    facts = fingerprints(shards, DEFAULT_STORAGE)
    names = (redact(shard) if is_remote(shard) else os.path.abspath(shard) for shard in shards)
    return [[name, *fact] for name, fact in zip(names, facts, strict=True)]


def path_input(path: str | Path) -> list[Any]:
    """Returns [name, size, time of the last change in ns] of a file, or of all in a folder but hidden files;
    the name alone of what is not there, which is refused where it is opened.
    """
    root = Path(os.path.abspath(path))
    if not root.exists():
        return [str(root)]
    below = [] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]
    shown = (path for path in below if not any(name[0] == "." for name in path.relative_to(root).parts))
    status = [path.stat() for path in ([root] if root.is_file() else shown)]
    return [
        str(root),
        sum(each.st_size for each in status),
        max((each.st_mtime_ns for each in status), default=0),
    ]


def _local(shard: str) -> Fingerprint | str:
    try:
        status = os.stat(shard)
        if not stat.S_ISREG(status.st_mode):
            return f"{shard} (not a file)"
        if not os.access(shard, os.R_OK):
            return f"{shard} (permission denied)"
        return status.st_size, status.st_mtime_ns
    except OSError as error:
        if os.path.islink(shard):
            return f"{shard} (dangling link)"
        return f"{shard} ({(error.strerror or 'unreadable').lower()})"
