"""The walk over one input shard: which of its samples are kept, how often, and on which side."""

from __future__ import annotations

import os
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.data.key_table import KeyTable, shard_key, text_hash
from clipkit.data.query import UNKNOWN, Fields, value_text
from clipkit.data.query import Path as FieldPath
from clipkit.data.reshard.job import UID, Reshard, read_job
from clipkit.data.scan import SampleSpan, ShardWalk
from clipkit.data.tar_index import replacing
from clipkit.data.uid_subset import UidSubset
from clipkit.types import DataError

Rows = NDArray[Any]

# copy: 0, or the number of a further copy that a subset asks for; start, size: bytes of the input shard.
ROW = np.dtype([("shard", "<u4"), ("copy", "<u4"), ("start", "<i8"), ("size", "<i8"), ("hash", "<u8")])
CHOICE = np.dtype([("side", "u1"), *((name, ROW[name]) for name in ROW.names or ())])


def choices_path(folder: Path, number: int) -> Path:
    """Returns where the choices of one input shard are kept while the job runs."""
    return folder / f"choices-{number:06d}.npy"


def choose(folder: Path, number: int) -> dict[str, int]:
    """Walks input shard `number` of the job in `folder` and keeps its choices (CHOICE) there; returns counts.

    Raises DataError for any damage.
    """
    chooser = _chooser(folder)
    shard = chooser.job.shards[number]
    try:
        with open(shard, "rb") as file:
            rows, counts = chooser.walk(number, file.fileno())
    except OSError as error:
        raise DataError(f"{shard}: {error.strerror or error}", "check the storage") from error
    with replacing(choices_path(folder, number)) as out:
        np.save(out, rows, allow_pickle=False)
    return dict(counts)


@lru_cache(1)
def _chooser(folder: Path) -> _Chooser:
    return _Chooser(read_job(folder), folder)


def subset_stem(folder: Path) -> Path:
    """Returns the stem of the files of a subset table."""
    return folder / "subset"


def fields_stem(folder: Path) -> Path:
    """Returns the stem of the files of a table of fields."""
    return folder / "fields"


class _Chooser:
    def __init__(self, job: Reshard, folder: Path) -> None:
        self.job = job
        self.query = job.query
        self._names = Counter(map(os.path.basename, job.shards))
        self.uids = UidSubset(job.subset) if job.uids and job.subset is not None else None
        self.subset = KeyTable(subset_stem(folder)) if job.subset_table is not None else None
        self.fields = KeyTable(fields_stem(folder)) if job.fields is not None else None

    def walk(self, number: int, descriptor: int) -> tuple[Rows, Counter[str]]:
        status = os.fstat(descriptor)
        labels = self._labels(number)
        walk = ShardWalk(
            self.job.shards[number],
            lambda offset, size: os.pread(descriptor, size, offset),
            status.st_size,
            status.st_mtime_ns,
        )
        counts: Counter[str] = Counter()
        found, uids = [], []
        for span in walk.samples():
            counts["samples read"] += 1
            kept = self._kept(span, descriptor, labels, counts)
            if kept is not None:
                side, uid = kept
                found.append((side, number, 0, span.start, span.end - span.start, text_hash(span.key)))
                uids.append(uid)
        counts["ignored members"] += walk.result().ignored
        rows = np.array(found, dtype=CHOICE)
        if self.uids is not None:
            rows = _copied(rows, self.uids.counts(uids))
            counts["outside the subset"] += len(found) - int((rows["copy"] == 0).sum())
        counts["kept"] += len(rows)
        return rows, counts

    def _labels(self, number: int) -> tuple[str, ...]:
        """What a list may call a shard: its path, and its file name where no other shard has it."""
        shard = self.job.shards[number]
        name = os.path.basename(shard)
        return (name, shard) if self._names[name] == 1 else (shard,)

    def _kept(
        self, span: SampleSpan, descriptor: int, labels: tuple[str, ...], counts: Counter[str]
    ) -> tuple[int, str | None] | None:
        """The side of a sample and its uid; None for one that is left out."""

        def member(extension: str) -> bytes | None:
            found = span.members.get(extension)
            return None if found is None else os.pread(descriptor, found.size, found.data)

        look = Fields(span.key, member)
        if self.subset is not None:
            name = _name(look, self.job.match_path)
            if name is None or not _listed(self.subset, name, labels):
                counts["outside the subset"] += 1
                return None
        if self.fields is not None:
            name = _name(look, self.job.match_path)
            row = None if name is None else self.fields.find(name)
            counts["without a row in the table" if row is None else "with a row in the table"] += 1
            look = Fields(span.key, member, None if self.job.as_text else row)
        if self.query is not None:
            holds = self.query.matches(look)
            if not holds:
                counts["where: unknown" if holds is None else "where: false"] += 1
                return None
        return self._side(look, counts), self._uid(look)

    def _side(self, look: Fields, counts: Counter[str]) -> int:
        if not self.job.split:
            return 0
        group = _name(look, self.job.group_path)
        if group is None:
            counts["without a group"] += 1
            group = value_text(look(("key",)))
        drawn = text_hash(f"clipkit split {group}") / 2**64
        # The last share ends at 1 whatever the rounding of the others.
        return int(np.searchsorted(np.cumsum(self.job.split[:-1]), drawn, side="right"))

    def _uid(self, look: Fields) -> str | None:
        if self.uids is None:
            return None
        if self.job.match is not None:
            return _name(look, self.job.match_path)
        uid = _name(look, UID)
        return _name(look, ("key",)) if uid is None else uid


def _listed(subset: KeyTable, name: str, labels: tuple[str, ...]) -> bool:
    if subset.by_shard:
        return any(shard_key(label, name) in subset for label in labels)
    return name in subset


def _name(look: Fields, path: FieldPath) -> str | None:
    """The text of a field; None where there is none, or null."""
    value = look(path)
    return None if value is UNKNOWN or value is None else value_text(value)


def _copied(rows: Rows, times: NDArray[np.int64]) -> Rows:
    """Rows as often as `times` says, numbered 0, 1, ... within each."""
    copied = np.repeat(rows, times)
    first = np.repeat(np.cumsum(times) - times, times)
    copied["copy"] = np.arange(len(copied)) - first
    return copied
