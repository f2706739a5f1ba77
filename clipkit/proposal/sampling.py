"""A bounded, spread sample of training data, copied into small shards of its own."""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from clipkit.data.engine import Engine
from clipkit.data.fingerprints import fingerprints
from clipkit.data.indexing import Indexing
from clipkit.data.making import MakeJob, Making
from clipkit.data.making.collection import Entry, Images, collect
from clipkit.data.making.samples import Layout
from clipkit.data.options import DEFAULT_STORAGE
from clipkit.data.raw.reading import Plan
from clipkit.data.shards import shard_name, write_members
from clipkit.data.source import expand_shards, is_remote, needs_stream
from clipkit.data.stated_counts import stated_total
from clipkit.data.tables import UNREADABLE
from clipkit.data.walked import walked_samples
from clipkit.types import ConfigError, DataError

SAMPLE = 4096  # pairs that are looked at
MAX_BYTES = 1 << 30  # of their pictures: of photographs as cameras write them, fewer are copied
_WEIGHED = 32  # pictures that tell how large they are
_SHARDS = 8  # of a set of shards, those whose beginnings are looked at
_COMPARED = 500_000  # captions of a table that are compared with one another
_ASKED = 1000  # remote shards that are asked for their size; of more, the chosen ones alone

Progress = Callable[[str, int, int], None]


@dataclass
class Sampled:
    """What was copied into a folder, and what is known of the whole.

    pairs      samples of the whole; exact: whether they were counted, otherwise it is an estimate
    captions   fields that hold the captions, () where the shards must tell
    rejected   entries of the sample that could not be used, by reason
    distinct   (distinct captions, captions compared) where the whole was read, None where it was not
    """

    pairs: int
    exact: bool
    captions: tuple[str, ...] = ()
    rejected: Counter[str] = field(default_factory=Counter)
    distinct: tuple[int, int] | None = None


def copy_raw(plan: Plan, folder: Path, progress: Progress) -> Sampled:
    """Copies a sample of raw data into `folder`, after one pass over its rows. Raises DataError."""
    chosen, pairs, distinct = _choose(plan, progress)
    chosen = _affordable(chosen, plan.found.images)
    found = replace(plan.found, entries=lambda: iter(chosen))
    collection = collect(str(plan.place), found, plan.reading)
    try:
        job = MakeJob(collection, folder, Making(SAMPLE, max_reject_fraction=1.0), Layout())
        job.begin(overwrite=True)
        made = job.run(Engine())
    finally:
        collection.close()
    return Sampled(pairs, True, plan.fields, made.rejects, distinct)


def _choose(plan: Plan, progress: Progress) -> tuple[list[Entry], int, tuple[int, int] | None]:
    """Returns the sampled entries in order, the number of samples, and how many captions are distinct.

    The entries with the smallest hashes of their numbers: spread evenly, the same ones every time.
    """
    heap: list[tuple[int, int, Entry]] = []
    captions: set[bytes] = set()
    images: set[bytes] = set()
    rows = compared = 0
    for rows, entry in enumerate(plan.found.entries(), 1):
        rank = -int.from_bytes(_hash(str(rows)), "big")
        if len(heap) < SAMPLE:
            heapq.heappush(heap, (rank, rows, entry))
        elif rank > heap[0][0]:
            heapq.heapreplace(heap, (rank, rows, entry))
        if plan.found.grouped:
            images.add(_hash(entry.image))
        if compared < _COMPARED and plan.place.is_file() and entry.captions:
            captions.add(_hash(entry.captions[0]))
            compared += 1
        if rows % 10_000 == 0:
            progress("reading rows", rows, rows)
    if not rows:
        raise DataError(f"{plan.place}: no rows", "add one row per image or caption")
    chosen = [entry for _, _, entry in sorted(heap, key=lambda item: item[1])]
    return chosen, len(images) or rows, (len(captions), compared) if compared else None


def _affordable(chosen: list[Entry], images: Images) -> list[Entry]:
    """Every n-th of the entries, so that their pictures are MAX_BYTES together, about."""
    sizes = []
    for entry in chosen[:: -(-len(chosen) // _WEIGHED)]:
        # What cannot be read is counted when it is copied.
        with contextlib.suppress(*UNREADABLE):
            sizes.append(len(images.read(entry.image)))
    volume = sum(sizes) / max(1, len(sizes)) * len(chosen)
    return chosen[:: max(1, math.ceil(volume / MAX_BYTES))]


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def copy_shards(spec: str, folder: Path, progress: Progress) -> Sampled:
    """Copies the first samples of a few of the shards into `folder`. Raises ConfigError and DataError."""
    shards = expand_shards(spec, allow_pipe=True)
    streamed = next((shard for shard in shards if needs_stream(shard)), None)
    if streamed is not None:
        raise ConfigError(
            f"{streamed}: only plain .tar shards are looked at", "unpack it, or write the run file by hand"
        )
    count = min(_SHARDS, len(shards))
    chosen = [shards[number * len(shards) // count] for number in range(count)]
    samples = volume = 0
    for number, shard in enumerate(chosen):
        taken = islice(_members(shard, MAX_BYTES // count), SAMPLE // count)
        record = write_members(folder / shard_name(number), taken)
        samples, volume = samples + record.samples, volume + record.bytes
        progress("looking at shards", number + 1, count)
    if not samples:
        raise DataError(
            f"{spec}: no sample in {count} of {len(shards)} shards", "give shards that hold samples"
        )
    known = _counted(shards)
    if known is not None:
        return Sampled(known, True)
    asked = shards if len(shards) <= _ASKED or not is_remote(shards[0]) else chosen
    total = sum(size for size, _ in fingerprints(asked, DEFAULT_STORAGE)) * len(shards) / len(asked)
    return Sampled(round(total / volume * samples), False)


def _members(shard: str, limit: int) -> Iterator[dict[str, Any]]:
    """The first samples of a shard as their members, of about `limit` bytes; damage is an error when it is
    reached.
    """
    taken = 0
    for sample in walked_samples(shard):
        if taken > limit:
            return
        taken += len(sample.chunk)
        yield {"__key__": sample.key} | {name: sample.chunk[a:b] for name, (a, b) in sample.members.items()}


def _counted(shards: list[str]) -> int | None:
    """The number of samples where an index or a file beside the shards says it."""
    if len(shards) <= _ASKED or not is_remote(shards[0]):
        index = Indexing(shards).saved()
        if index is not None:
            return index.num_samples
    return stated_total(shards, DEFAULT_STORAGE)
