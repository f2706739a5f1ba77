"""The walk over one input shard: which of its samples are kept, how often, and on which side."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.data.key_table import KeyTable, shard_key, text_hash
from clipkit.data.query import UNKNOWN, Fields, value_text
from clipkit.data.query import Path as FieldPath
from clipkit.data.reshard.job import UID, Reshard, read_job
from clipkit.data.reshard.named import found_path, write_found
from clipkit.data.scan import SampleSpan, ShardWalk
from clipkit.data.tar_index import replacing
from clipkit.data.uid_subset import UidSubset
from clipkit.types import DataError

Rows = NDArray[Any]
SUBSET, FIELDS = "subset", "fields"

# copy: 0, or the number of a further copy that a subset asks for; start, size: bytes of the input shard.
ROW = np.dtype([("shard", "<u4"), ("copy", "<u4"), ("start", "<i8"), ("size", "<i8"), ("hash", "<u8")])
CHOICE = np.dtype([("side", "u1"), *((name, ROW[name]) for name in ROW.names or ())])


def choices_path(folder: Path, number: int) -> Path:
    """Returns where the choices of one input shard are kept while the job runs."""
    return folder / f"choices-{number:06d}.npy"


def choose(folder: Path, number: int) -> dict[str, dict[str, Any]]:
    """Walks input shard `number` of the job in `folder` and keeps its choices (CHOICE) there.

    Returns {"counts": what was counted, "seen": what the condition met, as a dict}. Raises DataError for any
    damage.
    """
    chooser = _chooser(folder)
    shard = chooser.job.shards[number]
    try:
        with open(shard, "rb") as file:
            rows, counts, found = chooser.walk(number, file.fileno())
    except OSError as error:
        raise DataError(f"{shard}: {error.strerror or error}", "check the storage") from error
    for kind, each in found.items():
        write_found(found_path(folder, kind, number), each)
    with replacing(choices_path(folder, number)) as out:
        np.save(out, rows, allow_pickle=False)
    return {"counts": dict(counts), "seen": {} if chooser.query is None else asdict(chooser.query.seen)}


@lru_cache(1)
def _chooser(folder: Path) -> _Chooser:
    return _Chooser(read_job(folder), folder)


def subset_stem(folder: Path) -> Path:
    """Returns the stem of the files of a subset table."""
    return folder / SUBSET


def fields_stem(folder: Path) -> Path:
    """Returns the stem of the files of a table of fields."""
    return folder / FIELDS


class _Chooser:
    def __init__(self, job: Reshard, folder: Path) -> None:
        self.job = job
        self.query = job.query
        self._names = Counter(map(os.path.basename, job.shards))
        self.uids = UidSubset(job.subset) if job.uids and job.subset is not None else None
        self.subset = KeyTable(subset_stem(folder)) if job.subset_table is not None else None
        self.fields = KeyTable(fields_stem(folder)) if job.fields is not None else None
        self._found: dict[str, list[int]] = {}

    def walk(self, number: int, descriptor: int) -> tuple[Rows, Counter[str], dict[str, Rows]]:
        """Returns the choices, what was counted, and by kind the rows of lists and tables that were found."""
        self._found = {SUBSET: [], FIELDS: []}
        self.query = self.job.query  # of this shard alone: what it has seen is returned
        status = os.fstat(descriptor)
        labels = self._labels(number)
        walk = ShardWalk(
            self.job.shards[number],
            lambda offset, size: os.pread(descriptor, size, offset),
            status.st_size,
            status.st_mtime_ns,
        )
        counts: Counter[str] = Counter()
        kept: list[tuple[int, ...]] = []
        uids: list[str | None] = []  # of all samples: a sample that is left out has its entry all the same
        chosen: list[int] = []
        for span in walk.samples():
            counts["samples read"] += 1
            side = self._side_of(span, descriptor, labels, counts, uids)
            if side is not None:
                kept.append((side, number, 0, span.start, span.end - span.start, text_hash(span.key)))
                chosen.append(len(uids) - 1)
        counts["ignored members"] += walk.result().ignored
        rows = np.array(kept, dtype=CHOICE)
        found = {kind: np.array(each, np.int64) for kind, each in self._found.items()}
        if self.uids is not None:
            first, end = self.uids.locate(uids).T
            found[SUBSET] = np.repeat(first, end - first) + _within(end - first)
            times = (end - first)[chosen]
            rows = np.repeat(rows, times)
            rows["copy"] = _within(times)
            counts["outside the subset"] += int((times == 0).sum())
        counts["kept"] += len(rows)
        return rows, counts, found

    def _labels(self, number: int) -> tuple[str, ...]:
        """What a list may call a shard: its path, and its file name where no other shard has it."""
        shard = self.job.shards[number]
        name = os.path.basename(shard)
        return (name, shard) if self._names[name] == 1 else (shard,)

    def _side_of(
        self,
        span: SampleSpan,
        descriptor: int,
        labels: tuple[str, ...],
        counts: Counter[str],
        uids: list[str | None],
    ) -> int | None:
        """The side of a sample, None for one that is left out; its uid goes to `uids` of a subset of uids."""

        def member(extension: str) -> bytes | None:
            found = span.members.get(extension)
            return None if found is None else os.pread(descriptor, found.size, found.data)

        look = Fields(span.key, member)
        if self.uids is not None:
            uids.append(self._uid(look))
        if self.subset is not None:
            name = _name(look, self.job.match_path)
            if name is None or not self._listed(self.subset, name, labels):
                counts["outside the subset"] += 1
                return None
        if self.fields is not None:
            name = _name(look, self.job.match_path)
            at = None if name is None else self.fields.locate(name)
            row = None
            if at is not None:
                row = self.fields.row(at)
                self._found[FIELDS].append(at)
            counts["without a row in the table" if row is None else "with a row in the table"] += 1
            look = Fields(span.key, member, None if self.job.as_text else row)
        if self.query is not None:
            holds = self.query.matches(look)
            if not holds:
                counts["where: unknown" if holds is None else "where: false"] += 1
                return None
        return self._side(look, counts)

    def _listed(self, subset: KeyTable, name: str, labels: tuple[str, ...]) -> bool:
        names = [shard_key(label, name) for label in labels] if subset.by_shard else [name]
        rows = [at for each in names if (at := subset.locate(each)) is not None]
        self._found[SUBSET] += rows
        return bool(rows)

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
        if self.job.match is not None:
            return _name(look, self.job.match_path)
        uid = _name(look, UID)
        return _name(look, ("key",)) if uid is None else uid


def _name(look: Fields, path: FieldPath) -> str | None:
    """The text of a field; None where there is none, or null."""
    value = look(path)
    return None if value is UNKNOWN or value is None else value_text(value)


def _within(times: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ... up to each of `times`, one after the other."""
    numbers: NDArray[np.int64] = np.arange(int(times.sum())) - np.repeat(np.cumsum(times) - times, times)
    return numbers
