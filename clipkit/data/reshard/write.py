"""One output shard: its samples from random reads of the inputs, with what a table adds, in a tar."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.data.indexing import RECORDS, write_record
from clipkit.data.key_table import KeyTable, text_hash
from clipkit.data.query import UNKNOWN, Fields, value_text
from clipkit.data.reshard.job import Reshard
from clipkit.data.reshard.plan import read_plan
from clipkit.data.reshard.select import Rows, fields_stem
from clipkit.data.sample import RawSample, parse_chunk
from clipkit.data.scan import scan_shard
from clipkit.data.shards import normalize_caption, shard_name, write_copied_shard
from clipkit.data.source import LocalShards, changed

WINDOW_BYTES = 16 << 20
"""Bytes of samples in memory at a time, per worker; within them, reads go through the inputs in order."""

Members = dict[str, bytes]


def write_output(folder: Path, number: int) -> dict[str, Any]:
    """Writes output shard `number` of the plan in `folder`, and what the index needs to know of it.

    Returns {"shard": its ShardRecord as a dict, "counts": what was counted}.
    """
    plan = read_plan(folder)
    job = plan.job
    part = plan.parts[number]
    rows = plan.rows(part.side, part.begin, part.end)
    repeated = plan.repeated(rows["hash"])
    writing = _Writing(job, _inputs(folder), _fields(folder) if job.fields is not None else None)
    path = job.folders[part.side] / shard_name(part.number)
    samples = writing.samples(rows, repeated.tolist(), part.begin)
    record = write_copied_shard(path, samples, cure="give every sample a new key with --rekey")
    known = path.parent / RECORDS
    known.mkdir(exist_ok=True)
    absolute = os.path.abspath(path)
    write_record(known, absolute, scan_shard(absolute))
    return {"shard": vars(record), "counts": dict(writing.counts)}


@lru_cache(1)
def _fields(folder: Path) -> KeyTable:
    return KeyTable(fields_stem(folder))


@lru_cache(1)
def _inputs(folder: Path) -> LocalShards:
    # By the folder, which is named after the stamps of the inputs: never files open from an earlier job.
    return LocalShards(read_plan(folder).job.shards)


@dataclass
class _Writing:
    job: Reshard
    inputs: LocalShards
    fields: KeyTable | None
    counts: Counter[str] = field(default_factory=Counter)

    def samples(self, rows: Rows, repeated: Sequence[bool], first: int) -> Iterator[tuple[str, Members]]:
        """Yields key and members of the samples `rows`, the first of which has the position `first`."""
        position = first
        for sample, row, again in zip(self._read(rows), rows.tolist(), repeated, strict=True):
            shard, copy, *_ = row
            members = {name: sample.chunk[slice(*span)] for name, span in sample.members.items()}
            if self.fields is not None:
                members |= self._added(sample, self.fields)
            yield self._key(sample.key, position, shard if again else None, copy), members
            position += 1

    def _key(self, key: str, position: int, shard: int | None, copy: int) -> str:
        if self.job.rekey:
            return f"{position:09d}"
        key = key if shard is None else f"{shard:05d}-{key}"
        return f"{key}-{copy}" if copy else key

    def _read(self, rows: Rows) -> Iterator[RawSample]:
        """The samples of `rows` in order; each window is read in the order of the inputs."""
        inputs = self.inputs
        windows = list(_windows(rows))
        for at, (begin, end) in enumerate(windows):
            if at == 0:
                _expect(inputs, rows[begin:end])
            if at + 1 < len(windows):
                _expect(inputs, rows[slice(*windows[at + 1])])
            window = rows[begin:end]
            found: list[RawSample | None] = [None] * len(window)
            for place in np.lexsort((window["start"], window["shard"])).tolist():
                found[place] = self._sample(inputs, window[place])
            yield from (sample for sample in found if sample is not None)

    def _sample(self, inputs: LocalShards, row: Any) -> RawSample:
        shard, start, size = int(row["shard"]), int(row["start"]), int(row["size"])
        chunk = inputs.read(shard, start, start + size)
        (sample,) = parse_chunk(chunk, 1, self.job.shards[shard], start)
        if text_hash(sample.key) != int(row["hash"]):
            raise changed(self.job.shards[shard], f"another key at byte {start}")
        return sample

    def _added(self, sample: RawSample, table: KeyTable) -> Members:
        """The member that a row of the table makes or changes; none for a sample without a row."""
        look = Fields(sample.key, sample.member)
        name = look(self.job.match_path)
        row = None if name is UNKNOWN or name is None else table.find(value_text(name))
        if row is None:
            return {}
        if self.job.as_text:
            (value,) = row.values()
            caption = "" if value is None else normalize_caption(value_text(value))
            self.counts["captions replaced" if caption else "empty captions in the table"] += 1
            return {"txt": _utf8(caption)} if caption else {}
        document = look.document() if "json" in sample.members else {}
        if not isinstance(document, dict):
            self.counts["JSON members that hold no fields, left as they are"] += 1
            return {}
        self.counts["samples with new fields"] += 1
        text = json.dumps({**document, **row}, ensure_ascii=False, sort_keys=True)
        try:
            return {"json": text.encode()}
        except UnicodeEncodeError:
            # Half a surrogate pair, which only an escape can hold.
            return {"json": json.dumps({**document, **row}, sort_keys=True).encode()}


def _utf8(caption: str) -> bytes:
    return caption.encode("utf-8", "replace")


def _windows(rows: Rows) -> Iterator[tuple[int, int]]:
    """Yields ranges of rows of at most WINDOW_BYTES, one row at least."""
    ends = np.cumsum(rows["size"])
    begin = 0
    while begin < len(rows):
        before = int(ends[begin] - rows["size"][begin])
        end = int(np.searchsorted(ends, before + WINDOW_BYTES, side="right"))
        end = max(begin + 1, end)
        yield begin, end
        begin = end


def _expect(inputs: LocalShards, rows: Rows) -> None:
    for shard, start, size in zip(
        rows["shard"].tolist(), rows["start"].tolist(), rows["size"].tolist(), strict=True
    ):
        inputs.expect(shard, start, start + size)
