"""The training stream over several sources: every source in its own order, put together by the mixture.

An epoch of the mixture is as many samples as its sources hold together. Each source counts epochs of its own:
one whose part of a batch is larger than its part of all samples goes over to the next while others do not.
Slots, and with them augmentations, are those of the mixture, so a sample that comes again is seen anew.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from clipkit import dist
from clipkit.data.captions import DRAWN
from clipkit.data.held_pairs import HeldOut
from clipkit.data.holdout import kept_samples
from clipkit.data.http_ranges import NoRanges
from clipkit.data.kept import Kept
from clipkit.data.loader import TrainStream
from clipkit.data.mixture import MIXTURE_VERSION, SAMPLES, Mixture, parts_of, source_lanes
from clipkit.data.mixture_survey import survey_mixture
from clipkit.data.options import LoaderOptions, Source
from clipkit.data.order import ORDER_VERSION, Order, default_chunks, default_lanes, hash_key
from clipkit.data.position import saved_lanes
from clipkit.data.ranges import RowRanges
from clipkit.data.remote import ShardBytes
from clipkit.data.rows import Recipe, Row, SubBatch
from clipkit.data.shared_index import shared_index
from clipkit.data.source import expand_shards, is_remote, needs_stream
from clipkit.data.tar_index import Index
from clipkit.data.targets import stored_widths
from clipkit.data.waiting import together
from clipkit.data.window import Place, RowBuilder, WindowReader, first_samples
from clipkit.types import ConfigError, DataError


class MixtureReader(RowBuilder):
    """Builds rows of the global batches of a mixture from the readers of its sources. Picklable.

    Ids of samples run on from source to source. names: of the sources, for what is counted.
    """

    def __init__(
        self, mixture: Mixture, names: Sequence[str], readers: Sequence[WindowReader], steps_per_epoch: int
    ) -> None:
        # Recipes of sources differ in where captions are found, not in what is built of them.
        super().__init__(readers[0].recipe)
        self.names = tuple(names)
        self.mixture = mixture
        self.readers = tuple(readers)
        self.steps_per_epoch = steps_per_epoch
        self.first_id = np.cumsum([0, *(reader.index.num_samples for reader in readers)])

    def sub_batch(self, step: int, first: int, end: int) -> SubBatch:
        """Returns rows first..end of global batch `step` (counted over all epochs)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        base = within * self.mixture.batch_size
        places: dict[int, tuple[int, Place]] = {}
        for source in range(len(self.readers)):
            places |= self._places(source, step, first, end)
        rows = (self._row(*places[row], epoch, base + row) for row in range(first, end))
        before = self._retried()
        built = self._build(epoch, range(base + first, base + end), rows)
        return replace(built, retries=self._retried() - before)

    def _places(self, source: int, step: int, first: int, end: int) -> dict[int, tuple[int, Place]]:
        reader = self.readers[source]
        lanes, length = reader.order.lanes, reader.order.lane_length
        drawn = self.mixture.draws(source, lanes, step, first, end)
        span = self.mixture.batch_size // lanes
        reader.begin(drawn.least // length, (first // span, (end - 1) // span + 1))
        epochs, positions = np.divmod(drawn.counts, length)
        columns = (column.tolist() for column in (drawn.rows, epochs, drawn.lanes, positions))
        return {row: (source, Place(*place)) for row, *place in zip(*columns, strict=True)}

    def _row(self, source: int, place: Place, epoch: int, slot: int) -> Row:
        row = self.readers[source].row(place, epoch, slot)
        name = self.names[source]
        counted = (f"{SAMPLES}/{name}", *(_of_source(name, each) for each in row.content.counted))
        return row._replace(
            sample_id=row.sample_id + int(self.first_id[source]),
            content=row.content._replace(counted=counted),
        )

    def _place(self, sample_id: int) -> tuple[str, int]:
        source = int(np.searchsorted(self.first_id, sample_id, side="right")) - 1
        return self.readers[source]._place(sample_id - int(self.first_id[source]))

    def _retried(self) -> int:
        return sum(reader.retried for reader in self.readers)


def _of_source(source: str, name: str) -> str:
    """captions/txt -> captions/SOURCE/txt."""
    kind, _, field = name.partition("/")
    return f"{kind}/{source}/{field}"


class MixtureStream(TrainStream):
    """The stream over several sources."""

    def __init__(
        self,
        reader: MixtureReader,
        ranges: RowRanges,
        options: LoaderOptions,
        position: dict[str, Any],
        banner: dict[str, Any],
    ) -> None:
        super().__init__(reader, ranges, reader.recipe, options, position, banner)
        self._readers = reader.readers
        self._mixture = reader.mixture
        self._names = reader.names
        self._sizes = tuple(int(source["num_samples"]) for source in position["sources"])

    @property
    def counted(self) -> tuple[str, ...]:
        """The names that `Batch.counts` may hold."""
        return (
            *(f"{SAMPLES}/{source}" for source in self._names),
            *(
                _of_source(source, name)
                for source, reader in zip(self._names, self._readers, strict=True)
                for name in reader.recipe.captions.counted
            ),
        )

    def summary(self) -> str:
        """Returns a line about size and order."""
        return f"{len(self._names)} sources together, {super().summary()}"

    def describe_sources(self, total_steps: int) -> list[str]:
        """Returns a line about each source in a run of so many steps."""
        totals = self._mixture.totals(total_steps)
        return [
            f"source {name}: {size:,} samples, {self._share(number)}, seen {total / size:.3g} times"
            for number, (name, size, total) in enumerate(zip(self._names, self._sizes, totals, strict=True))
        ]

    def _share(self, number: int) -> str:
        least, most = self._mixture.share(number)
        rows = f"{least:,}" if least == most else f"{least:,} or {most:,}"
        percent = 100 * self._mixture.parts[number] / self._mixture.whole
        return f"{percent:.4g}% of every batch ({rows} of {self._mixture.batch_size:,})"


@dataclass(frozen=True)
class _Opened:
    """A source whose shards are indexed."""

    name: str
    kept: Kept
    bytes: ShardBytes


def open_mixture(
    options: LoaderOptions, recipes: Sequence[Recipe], world: dist.World, saved: dict[str, Any] | None
) -> MixtureStream:
    """Returns the training stream over all sources; called by all ranks. recipes: one per source.

    Raises ConfigError or DataError, the same on every rank.
    """
    if options.index == "lazy":
        raise ConfigError(
            "data.index: lazy does not go with several sources: their sizes must be known",
            "leave data.index out; clipkit index prepares the sources, on several machines if need be",
        )
    mixture = Mixture(
        options.batch_size, parts_of([source.weight for source in options.sources]), options.seed
    )
    opened = _opened(options, world)
    total = sum(source.kept.num_samples for source in opened)
    for number, source in enumerate(opened):
        _check_share(source, mixture.share(number)[1], options)
    lanes, orders = _orders(opened, options, world, saved)
    widths = _widths(opened, recipes[0], options)
    readers = [
        WindowReader(
            source.kept, order, replace(recipe.for_pairs(total), widths=widths), options, source.bytes
        )
        for source, order, recipe in zip(opened, orders, recipes, strict=True)
    ]
    position: dict[str, Any] = {
        "order_version": ORDER_VERSION,
        "mixture_version": MIXTURE_VERSION,
        "exact": True,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "lanes": lanes,
        "num_samples": total,
        "sources": [
            _position(part, source, order)
            for part, source, order in zip(mixture.parts, opened, orders, strict=True)
        ],
    }
    names = [source.name for source in opened]
    reader = MixtureReader(mixture, names, readers, total // options.batch_size)
    ranges = RowRanges(options.batch_size, lanes, world, options.workers, options.uneven)
    stream = MixtureStream(reader, ranges, options, position, _banner(opened, position))
    stream.held = tuple(
        HeldOut(opening.kept, source.captions)
        for opening, source in zip(opened, options.sources, strict=True)
        if len(opening.kept.held)
    )
    if DRAWN in recipes[0].sources:
        read = [
            (source.kept, source.bytes, recipe.captions)
            for source, recipe in zip(opened, recipes, strict=True)
        ]
        stream.survey = partial(survey_mixture, read, mixture.parts, options.seed)
    return stream


def _banner(opened: Sequence[_Opened], position: dict[str, Any]) -> dict[str, Any]:
    held_out = sum(len(source.kept.held) for source in opened)
    return {
        "samples": position["num_samples"],
        "shards": sum(len(source.kept.index.shards) for source in opened),
        "exact": True,
        "lanes": position["lanes"],
        "sources": dict(zip((source.name for source in opened), position["sources"], strict=True)),
        "ignored_members": sum(source.kept.index.ignored for source in opened),
        "index": [source.kept.index.file or "in memory" for source in opened],
        **({"held_out": held_out} if held_out else {}),
    }


def _position(part: int, source: _Opened, order: Order) -> dict[str, Any]:
    """What of a source defines the order."""
    return {
        "parts": part,
        "num_samples": source.kept.num_samples,
        "index_sha": source.kept.index.sha,
        **({"held_out": source.kept.sha} if source.kept.sha else {}),
        "lanes": order.lanes,
        "chunk_size": order.chunk_size,
        "window_chunks": order.window_chunks,
    }


def source_names(sources: Sequence[Source]) -> tuple[str, ...]:
    """Returns the names of the sources: as given, or the folder of their shards, numbered where two agree."""
    found: list[str] = []
    for source in sources:
        plain = name = source.name or _folder_name(source.shards)
        number = 1
        while name in found:
            number += 1
            name = f"{plain} {number}"
        found.append(name)
    return tuple(found)


def _folder_name(shards: str | tuple[str, ...]) -> str:
    spec = shards if isinstance(shards, str) else shards[0]
    path = spec.partition("?")[0].partition("://")[2] if is_remote(spec) else spec
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    plain = [part for part in parts if not part.endswith(".tar") and not set(part) & set("{*?[")]
    # Without a folder the file itself; of a remote address never the host alone, which may hold a login.
    kept = plain[1:] if is_remote(spec) else plain
    return kept[-1] if kept else posixpath.splitext(parts[-1] if parts else "source")[0]


def _opened(options: LoaderOptions, world: dist.World) -> list[_Opened]:
    indices = [_indexed(source, options, world) for source in options.sources]
    held = kept_samples(_together(indices), options).held
    first = np.cumsum([0, *(index.num_samples for index in indices)])
    cuts = np.searchsorted(held, first)
    return [
        _Opened(
            name,
            Kept(index, held[cuts[number] : cuts[number + 1]] - first[number]),
            ShardBytes(index, options.storage),
        )
        for number, (name, index) in enumerate(zip(source_names(options.sources), indices, strict=True))
    ]


def _indexed(source: Source, options: LoaderOptions, world: dist.World) -> Index:
    shards: list[str] = together(lambda: expand_shards(source.shards, allow_pipe=options.allow_pipe))
    streamed = next((shard for shard in shards if needs_stream(shard)), None)
    if streamed is not None:
        raise ConfigError(
            f"{streamed}: cannot be indexed, and stands in a mixture",
            "use plain .tar files for every source of a mixture, or train on this one alone",
        )
    try:
        return shared_index(shards, options, world)
    except NoRanges as problem:
        cure = "copy the shards to where ranges can be read: a mixture reads every source so"
        raise ConfigError(problem.cause, cure) from problem


def _together(indices: Sequence[Index]) -> Index:
    """The shards of all sources as those of one set, without the offsets of samples: keys decide what is held
    out, so a pair that two sources share is held out of both.
    """
    return Index(
        shards=tuple(shard for index in indices for shard in index.shards),
        counts=np.concatenate([index.counts for index in indices]),
        sizes=np.concatenate([index.sizes for index in indices]),
        stamps=np.concatenate([index.stamps for index in indices]),
        digests=tuple(digest for index in indices for digest in index.digests),
        ignored=0,
        stride=1,
        offsets=np.zeros(0, dtype=np.int64),
        file=indices[0].file,
    )


def _check_share(source: _Opened, most: int, options: LoaderOptions) -> None:
    if most > source.kept.num_samples:
        raise ConfigError(
            f"the weight of the source {source.name} gives it {most:,} of the {options.batch_size:,} samples "
            f"of a batch, and it holds {source.kept.num_samples:,}: some would come twice in a batch",
            "lower its weight or data.batch_size",
        )


def _orders(
    opened: Sequence[_Opened], options: LoaderOptions, world: dist.World, saved: dict[str, Any] | None
) -> tuple[int, list[Order]]:
    """The lanes of the run and the order of every source, of the sizes that a continued run has."""
    # Every rank holds windows of all sources.
    affordable = [
        options.window_bytes / len(opened) / max(1.0, source.kept.index.sample_bytes) for source in opened
    ]
    lanes = saved_lanes(options, saved)
    kept = saved.get("sources", ()) if saved is not None else ()
    sizes: list[tuple[int, int, int]] = []
    counts = [source.kept.num_samples for source in opened]
    if lanes is not None and [e.get("num_samples") for e in kept] == counts:
        sizes = [(int(e["lanes"]), int(e["chunk_size"]), int(e["window_chunks"])) for e in kept]
    else:
        lanes = options.lanes or default_lanes(
            options.batch_size, world.size, min(affordable), options.uneven
        )
        for source, count, samples in zip(opened, counts, affordable, strict=True):
            own = source_lanes(count, lanes)
            chunks = default_chunks(count, own, -(-own // world.size), samples, source.kept.index.stride)
            sizes.append((own, *chunks))
    return lanes, [
        # One sample of each lane makes a batch of the source's own order.
        Order(source.kept.counts, each[0], *each, hash_key(options.seed, "source", number))
        for number, (source, each) in enumerate(zip(opened, sizes, strict=True))
    ]


def _widths(opened: Sequence[_Opened], recipe: Recipe, options: LoaderOptions) -> tuple[int, ...]:
    found = [
        stored_widths(first_samples(source.kept.index, source.bytes), recipe.stored, options.max_consecutive)
        for source in opened
    ]
    for source, widths in zip(opened, found, strict=True):
        for name, width, first in zip(recipe.stored, widths, found[0], strict=True):
            if width != first:
                raise DataError(
                    f"stored vectors .{name} are {first} wide in {opened[0].name}, {width} in {source.name}",
                    "write vectors of one model into all sources",
                )
    return found[0]
