"""Windows of a lane: their chunks read whole, and a good sample for every position of the order."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from clipkit.data.kept import Kept
from clipkit.data.options import LoaderOptions
from clipkit.data.order import EpochOrder, Order
from clipkit.data.rejects import LOST_CHUNK, reject
from clipkit.data.remote import ShardBytes
from clipkit.data.rows import Recipe, Row, SubBatch
from clipkit.data.sample import RawSample, Unusable, parse_chunk
from clipkit.data.source import Unreadable
from clipkit.data.tar_index import Index
from clipkit.redaction import redact
from clipkit.types import ClipkitError, DataError, Reject

Found = RawSample | Unusable
"""A sample, or why its bytes are not there."""


class Place(NamedTuple):
    """Where a sample stands in the order: its epoch, its lane and its position there."""

    epoch: int
    lane: int
    position: int


class Loaded(NamedTuple):
    """The samples of one window of a lane, `ids` in the order of the epoch."""

    lane: int
    start: int
    ids: list[int]
    samples: dict[int, Found]
    epoch: int = 0

    def holds(self, place: Place) -> bool:
        """Returns whether a place of the window's lane lies in it."""
        inside = self.start <= place.position < self.start + len(self.ids)
        return inside and self.epoch == place.epoch


class RowBuilder(ABC):
    """Builds sub-batches from rows that are read one by one."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._asked: Row | None = None

    @abstractmethod
    def _place(self, sample_id: int) -> tuple[str, int]:
        """Returns the shard of a sample and its position there."""

    def _build(self, epoch: int, slots: range, rows: Iterator[Row]) -> SubBatch:
        """Returns the sub-batch of these rows; what fails in it without being foreseen names the sample."""
        self._asked = None
        try:
            return self.recipe.build(epoch, slots, self._noted(rows))
        except ClipkitError:
            raise
        except Exception as error:
            # Rows are built one by one: the last one asked for is the one that failed.
            row = self._asked
            at = "its first sample" if row is None else f"sample {row.key} in {self._place(row.sample_id)[0]}"
            raise ClipkitError(
                f"slots {slots.start} to {slots.stop - 1} of epoch {epoch} cannot be built, at {at} "
                f"({type(error).__name__}: {error})",
                "an augmentation or a tokenizer failed: that is a defect, no bad sample would end a run",
            ) from error

    def _noted(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            self._asked = row
            yield row


class WindowRows(RowBuilder):
    """A good sample for every slot: its own, or the next good one of its window (cyclic), or what follows."""

    def __init__(self, recipe: Recipe, options: LoaderOptions) -> None:
        super().__init__(recipe)
        self.max_consecutive = options.max_consecutive

    @abstractmethod
    def _following(self, window: Loaded, at: int) -> Iterator[tuple[int, Found]]:
        """Yields the samples outside the window that may stand in for entry `at` of one without good ones."""

    def _row(self, window: Loaded, at: int, epoch: int, slot: int) -> Row:
        refused: list[tuple[str, int, Unusable]] = []
        for sample_id, sample in self._candidates(window, at):
            try:
                if isinstance(sample, Unusable):
                    raise sample
                content = self.recipe.prepare(sample, epoch, slot)
            except Unusable as problem:
                refused.append((self._key(sample_id, sample), sample_id, problem))
                if len(refused) >= self.max_consecutive:
                    break
                continue
            # Only the slot's own sample: those passed over after it are counted in their own slots.
            rejects = tuple(self._reject(first, slot, sample.key) for first in refused[:1])
            return Row(slot, sample_id, sample.key, content, rejects)
        key, sample_id, why = refused[0]
        raise DataError(
            f"{len(refused)} unusable samples in a row, the first: {key} in {self._place(sample_id)[0]} "
            f"({why.reason}: {why.detail})",
            "repair the shards, or raise data.max_consecutive",
        )

    def _candidates(self, window: Loaded, at: int) -> Iterator[tuple[int, Found]]:
        ids = window.ids
        for step in range(len(ids)):
            sample_id = ids[(at + step) % len(ids)]
            yield sample_id, window.samples[sample_id]
        yield from self._following(window, at)

    def _reject(self, rejected: tuple[str, int, Unusable], slot: int, substitute: str) -> Reject:
        key, sample_id, problem = rejected
        return reject(key, self._place(sample_id)[0], problem, slot, substitute)

    def _key(self, sample_id: int, sample: Found) -> str:
        if isinstance(sample, RawSample):
            return sample.key
        return f"sample {self._place(sample_id)[1]}"


class WindowReader(WindowRows):
    """Builds rows of global batches from indexed shards. Picklable; holds one window per lane it reads.

    In the place of a sample that cannot be used, in a window without good ones, stands the next good one in
    the shards. All other positions stay as they are. So are the samples of a chunk that cannot be read, up to
    `max_lost_chunks` of them in this process. The order numbers the samples that are `kept`; ids are those of
    the index.
    """

    def __init__(
        self, kept: Kept, order: Order, recipe: Recipe, options: LoaderOptions, source: ShardBytes
    ) -> None:
        super().__init__(recipe, options)
        self.kept = kept
        self.index = kept.index
        self.order = order
        self.max_lost_chunks = options.max_lost_chunks
        self._source = source
        self._lost: set[tuple[int, int]] = set()
        self._epochs: dict[int, EpochOrder] = {}
        self._lanes = (0, order.lanes)
        self._windows: dict[int, Loaded] = {}

    @property
    def retried(self) -> int:
        """Failed reads of this process that were followed by another attempt."""
        return self._source.retried

    def sub_batch(self, step: int, first: int, end: int) -> SubBatch:
        """Returns rows first..end of global batch `step` (counted over all epochs)."""
        epoch, within = divmod(step, self.order.steps_per_epoch)
        quota = self.order.quota
        base = within * self.order.batch_size
        slots = range(base + first, base + end)
        places = (Place(epoch, row // quota, within * quota + row % quota) for row in range(first, end))
        before = self.retried
        self.begin(epoch, (first // quota, (end - 1) // quota + 1))
        rows = (self.row(place, epoch, slot) for place, slot in zip(places, slots, strict=True))
        built = self._build(epoch, slots, rows)
        return replace(built, retries=self.retried - before)

    def begin(self, oldest: int, lanes: tuple[int, int]) -> None:
        """Says which lanes (first, end) are read from now on; epochs before `oldest` are forgotten."""
        if lanes != self._lanes:
            self._epochs.clear()
        self._lanes = lanes
        self._epochs = {number: epoch for number, epoch in self._epochs.items() if number >= oldest}

    def row(self, place: Place, epoch: int, slot: int) -> Row:
        """Returns the row of a slot of `epoch`: the sample at its place, or the good one that stands in."""
        window = self._windows.get(place.lane)
        if window is None or not window.holds(place):
            self._windows.pop(place.lane, None)
            window = self._windows[place.lane] = self._load(place)
        return self._row(window, place.position - window.start, epoch, slot)

    def _following(self, window: Loaded, at: int) -> Iterator[tuple[int, Found]]:
        first = self.kept.rank(window.ids[at])
        for step in range(1, self.kept.num_samples):
            sample_id = int(self.kept.ids(np.array((first + step) % self.kept.num_samples)))
            if sample_id not in window.samples:
                yield sample_id, self._read(*self.index.locate(sample_id), 1)[sample_id]

    def _place(self, sample_id: int) -> tuple[str, int]:
        shard, position = self.index.locate(sample_id)
        return self.index.shards[shard], position

    def _load(self, place: Place) -> Loaded:
        epoch = self._epochs.get(place.epoch)
        if epoch is None:
            epoch = self._epochs[place.epoch] = self.order.epoch(place.epoch, self._lanes)
        window = epoch.window_at(place.lane, place.position)
        ranks = np.sort(window.ids)
        ids = self.kept.ids(ranks)
        shards = np.searchsorted(self.index.first_id, ids, side="right") - 1
        within = ids - self.index.first_id[shards]
        chunks = (ranks - self.kept.first_rank[shards]) // self.order.chunk_size
        # One read per chunk: a new one starts where the shard or the chunk number changes.
        pieces = np.flatnonzero(np.diff(shards) | np.diff(chunks)) + 1
        samples: dict[int, Found] = {}
        for run in np.split(np.arange(len(ids)), pieces):
            first, last = int(run[0]), int(run[-1])
            shard = int(shards[first])
            samples |= self._read(shard, int(within[first]), int(within[last] - within[first]) + 1)
        return Loaded(place.lane, window.start, self.kept.ids(window.ids).tolist(), samples, place.epoch)

    def _read(self, shard: int, first: int, count: int) -> Mapping[int, Found]:
        """Samples first..first+count of a shard, all of one chunk, by id."""
        try:
            return read_samples(self.index, self._source, shard, first, count)
        except Unreadable as problem:
            begin, last = self._chunk(shard, first)
            self._lose(shard, begin, problem)
            # The same words for every sample of the chunk: losses are counted by them (see RejectBudget).
            why = Unusable(LOST_CHUNK, f"samples {begin} to {last} of the shard cannot be read")
            first_id = int(self.index.first_id[shard]) + first
            return dict.fromkeys(range(first_id, first_id + count), why)

    def _chunk(self, shard: int, position: int) -> tuple[int, int]:
        """Positions of the first and the last kept sample of a chunk; `position`: that of any of them."""
        size, first_id = self.order.chunk_size, int(self.index.first_id[shard])
        first_rank, end_rank = (int(rank) for rank in self.kept.first_rank[shard : shard + 2])
        begin = first_rank + (self.kept.rank(first_id + position) - first_rank) // size * size
        ids = self.kept.ids(np.array([begin, min(begin + size, end_rank) - 1])) - first_id
        return int(ids[0]), int(ids[1])

    def _lose(self, shard: int, chunk: int, problem: Unreadable) -> None:
        self._lost.add((shard, chunk))
        if len(self._lost) <= self.max_lost_chunks:
            print(redact(f"lost a chunk: {problem.cause}"), file=sys.stderr, flush=True)
        elif self.max_lost_chunks:
            raise Unreadable(
                f"{problem.cause}; more than data.max_lost_chunks={self.max_lost_chunks} chunks are lost",
                problem.cure,
            )
        else:
            raise problem


def read_samples(
    index: Index, source: ShardBytes, shard: int, first: int, count: int
) -> dict[int, RawSample]:
    """Returns samples first..first+count of a shard by id, with one read."""
    stored, number, begin, end = index.span(shard, first, first + count - 1)
    chunk = source.read(shard, begin, end)
    parsed = parse_chunk(chunk, number, index.shards[shard], begin)
    first_id = int(index.first_id[shard])
    return {first_id + at: parsed[at - stored] for at in range(first, first + count)}


def first_samples(index: Index, source: ShardBytes) -> Iterator[RawSample]:
    """Yields the samples in the order of the shards, each with a read of its own."""
    for sample_id in range(index.num_samples):
        yield read_samples(index, source, *index.locate(sample_id), 1)[sample_id]
