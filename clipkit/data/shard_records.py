"""One record per shard, worked out in parallel and kept while a job lasts: the survey of a set."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from clipkit.data.engine import Engine
from clipkit.data.fingerprints import fingerprints
from clipkit.data.finished import Finished
from clipkit.data.http_ranges import Transient
from clipkit.data.options import DEFAULT_STORAGE
from clipkit.redaction import redact
from clipkit.types import DataError

Record = dict[str, Any]
Part = tuple[Any, ...]
OnShard = Callable[[int, int], None]
"""Called with (shards done, shards in all)."""


class ShardRecords:
    """The records of a survey in `folder`, valid for one description of the survey; None: nothing is kept.

    A record holds `size` and `stamp` of its shard: it is used again while the shard has them and the part,
    (shard, other arguments of the survey...), is the same.
    """

    def __init__(self, folder: Path | None, job: dict[str, Any]) -> None:
        self._folder = folder
        self._finished = None if folder is None else Finished(folder, job)

    def get(self, part: Part) -> Record | None:
        """Returns the record of a shard that is still what it was."""
        record = None if self._finished is None else self._finished.get(_name(part))
        if record is None:
            return None
        try:
            now = fingerprints([part[0]], DEFAULT_STORAGE)[0]
        except (DataError, Transient):
            return None
        return record if (record.get("size"), record.get("stamp")) == now else None

    def put(self, part: Part, record: Record) -> None:
        """Keeps a record."""
        if self._finished is not None and self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._finished.put(_name(part), record)

    def clear(self) -> None:
        """Removes the records, and their folder if nothing else is in it."""
        if self._finished is not None and self._folder is not None:
            self._finished.clear()
            with contextlib.suppress(OSError):
                self._folder.rmdir()


def survey(
    function: Callable[..., Record],
    parts: Sequence[Part],
    engine: Engine,
    records: ShardRecords,
    on_shard: OnShard | None = None,
) -> Iterator[Record]:
    """Yields function(*part) of every part, in order; the shard is the first argument of each.

    Known records are not worked out again; new ones are kept as they come.
    """
    missing = {number for number, part in enumerate(parts) if records.get(part) is None}
    worked = engine.map(function, (parts[number] for number in sorted(missing)))
    for number, part in enumerate(parts):
        record = None if number in missing else records.get(part)
        if number in missing:
            record = next(worked)
            records.put(part, record)
        # A record that vanished in between is worked out here.
        yield function(*part) if record is None else record
        if on_shard is not None:
            on_shard(number + 1, len(parts))


def known(parts: Sequence[Part], records: ShardRecords) -> int:
    """Returns how many of the parts have a record."""
    return sum(records.get(part) is not None for part in parts)


def _name(part: Part) -> str:
    shard = str(part[0])
    # Without logins and signatures, and absolute: the same from every folder.
    path = redact(shard) if "://" in shard else os.path.abspath(shard)
    return hashlib.blake2b(os.fsencode(path) + repr(part[1:]).encode(), digest_size=12).hexdigest()
