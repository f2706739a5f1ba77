"""`data.index: lazy`: training starts at once, and the index is a by-product of its first epoch.

The first epoch has the order of `first_epoch`, the later ones the ordinary one. It ends, for all ranks at the
same step, before the first batch that some lane cannot fill; then what was not read is indexed.
"""

from __future__ import annotations

import hashlib
import posixpath
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch

from clipkit import dist
from clipkit.data.first_epoch import LaneReader, ShardOrder, first_lanes, sample_ids
from clipkit.data.indexing import DENSE_SAMPLES, Indexing, assemble
from clipkit.data.kept import Kept
from clipkit.data.loader import TrainStream
from clipkit.data.options import LoaderOptions
from clipkit.data.order import ORDER_VERSION, Order, divisors
from clipkit.data.position import order_sizes
from clipkit.data.ranges import RowRanges
from clipkit.data.remote import ShardBytes
from clipkit.data.rows import Passed, Recipe, SubBatch
from clipkit.data.scan import ShardScan
from clipkit.data.shared_index import shared_index
from clipkit.data.source import changed, is_remote, needs_stream
from clipkit.data.tar_index import SPARSE_STRIDE, Index
from clipkit.data.targets import stored_widths
from clipkit.data.waiting import together
from clipkit.data.window import WindowReader, first_samples
from clipkit.data.workers import built_parts
from clipkit.types import Batch, ClipkitError, ConfigError, DataError

_ENDED, _FAILED = 1.0, 2.0


class LazyStream(TrainStream):
    """The stream of a set whose index is built while its first epoch is read.

    Ids are (number of the shard, position in it) in all epochs: the ones of an index are not known at first.
    """

    def __init__(
        self,
        reader: LaneReader,
        recipe: Recipe,
        options: LoaderOptions,
        world: dist.World,
        position: dict[str, Any],
        banner: dict[str, Any],
    ) -> None:
        lanes = int(position["lanes"])
        super().__init__(
            reader,
            RowRanges(options.batch_size, lanes, world, options.workers),
            recipe,
            options,
            position,
            banner,
        )
        self._lane_reader = reader
        self._world = world
        self._end: int | None = None
        self._later: WindowReader | None = None
        self._passed: dict[int, Passed] = {}

    @property
    def pairs(self) -> int:
        """Large: a set that is worth a lazy index is taken to be one of the largest."""
        return sys.maxsize

    def summary(self) -> str:
        """Returns a line about size and order."""
        lanes = self._lane_reader.order.lanes
        first = f"exact order, shard-level in the first epoch ({lanes} lanes of shards)"
        if self._end is None:
            known = f"{len(self._lane_reader.files.shards):,} shards, indexed while the first epoch is read"
        else:
            known = (
                f"{self.num_samples:,} samples, {self.steps_per_epoch:,} steps per epoch after a first one "
                f"of {self._end:,}"
            )
        return f"{known}; {first}; crops and averages by default as for more than 50 million pairs"

    def world_sizes(self) -> list[int]:
        """Returns the numbers of processes that continue this run exactly."""
        return divisors(self._lane_reader.order.lanes if self._end is None else self._ranges.lanes)

    def ends_epoch(self, step: int) -> bool:
        """Returns whether the batch before step `step` of the run is known to have ended an epoch."""
        if self._end is None or self.steps_per_epoch is None:
            return False
        number = step + self._shift
        return number >= self._end and (number - self._end) % self.steps_per_epoch == 0

    def _batch_number(self, epoch: int, batch_in_epoch: int) -> int:
        if not epoch or self._end is None or self.steps_per_epoch is None:
            return batch_in_epoch
        return self._end + (epoch - 1) * self.steps_per_epoch + batch_in_epoch

    def state(self, step: int) -> dict[str, Any]:
        """Returns the JSON-able position before global batch `step`, and what defines the order.

        Called by all ranks. In the first epoch it lists how far every shard was read.
        """
        number = step + self._shift
        place = {"first_steps": self._end, "step": step}
        if self._end is None or self.steps_per_epoch is None:
            self._share()
            passed = {str(shard): list(how) for shard, how in sorted(self._lane_reader.known.items())}
            return {**self._position, **place, "epoch": 0, "batch_in_epoch": number, "passed": passed}
        epoch, within = divmod(max(0, number - self._end), self.steps_per_epoch)
        place |= (
            {"epoch": epoch + 1, "batch_in_epoch": within}
            if number >= self._end
            else {"epoch": 0, "batch_in_epoch": number}
        )
        return {**self._position, **place}

    def check_state(self, saved: dict[str, Any]) -> None:
        """Raises ConfigError naming the differing keys when a saved position cannot be continued exactly."""
        later = {key: self._position[key] for key in ("num_samples", "index_sha") if saved.get(key) is None}
        super().check_state({**saved, **later})

    def _batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        step = start_step
        if self._end is None or step < self._end:
            with closing(self._first_epoch(step, stop_step)) as batches:
                for batch in batches:
                    step += 1
                    yield batch
            if step < stop_step and self._end is None:
                self._finish(step)
        if step >= stop_step:
            return
        assert self._later is not None
        assert self._end is not None
        assert self.steps_per_epoch is not None
        offset = self.steps_per_epoch - self._end
        later = built_parts(self._later, self._ranges, self._options, step + offset, stop_step + offset)
        with closing(later) as steps:
            for parts in steps:
                yield self._merged([part and self._renumbered(part) for part in parts])

    def _first_epoch(self, start_step: int, stop_step: int) -> Generator[Batch]:
        """Yields until a lane of any rank is at its end; an error of any rank is raised on all of them."""
        reader = self._lane_reader
        lanes = reader.order.lanes
        ranges = RowRanges(
            self._options.batch_size,
            lanes,
            self._world,
            # Two workers in one lane would read its shards twice.
            min(self._options.workers, lanes // self._world.size),
        )
        stop = stop_step if self._end is None else min(stop_step, self._end)
        with closing(built_parts(reader, ranges, self._options, start_step, stop)) as steps:
            for _ in range(start_step, stop):
                parts: list[SubBatch | None] = []
                error: ClipkitError | None = None
                try:
                    parts = next(steps)
                except ClipkitError as caught:
                    error = caught
                outcome = _FAILED if error else _ENDED if None in parts else 0.0
                (worst,) = dist.agree([outcome], "max")
                if worst == _FAILED:
                    raise next(found for found in dist.gather_objects(error) if found is not None)
                if worst == _ENDED:
                    return
                for part in parts:
                    if part is not None:
                        reader.hold(part.passed)
                        self._passed |= part.passed
                yield self._merged(parts)

    def _share(self) -> None:
        for passed in dist.gather_objects(self._passed):
            self._lane_reader.hold(passed)
        self._passed = {}

    def _finish(self, end: int) -> None:
        """Indexes what the first epoch left unread, and goes over to the ordinary order."""
        self.on_indexing(f"the first epoch ended after step {end:,}; indexing the shards that it left unread")
        self._share()
        self.adopt(self._index(), end)
        read = end * self._options.batch_size
        self.on_indexing(f"the first epoch read {read:,} of {self.num_samples:,} samples")

    def _index(self) -> Index:
        return shared_index(list(self._lane_reader.files.shards), self._options, self._world)

    def adopt(self, index: Index | None, end: int) -> None:
        """Goes over to the order of the index (None: to be found) for the batches from `end` on.

        Raises DataError when it is not the index of what the first epoch read.
        """
        index = index or self._index()
        reader, options, position = self._lane_reader, self._options, self._position
        for shard, passed in reader.known.items():
            found = int(index.counts[shard])
            if passed.whole and (passed.samples, passed.digest) != (found, index.digests[shard]):
                raise changed(
                    index.shards[shard], f"{found} samples, {passed.samples} were read, or other ones"
                )
        sizes = (position["lanes"], position["chunk_size"], position["window_chunks"])
        order = Order(index.counts, options.batch_size, *sizes, options.seed)
        self._later = WindowReader(
            Kept(index), order, self._recipe, options, ShardBytes(index, options.storage)
        )
        self._end = end
        self.num_samples, self.steps_per_epoch = order.num_samples, order.steps_per_epoch
        self._position = {**position, "num_samples": order.num_samples, "index_sha": index.sha}
        self._banner |= {"samples": order.num_samples, "index": index.file or "in memory"}
        whole = zip(index.counts.tolist(), index.digests, strict=True)
        reader.known = {shard: Passed(count, digest, True) for shard, (count, digest) in enumerate(whole)}

    def _renumbered(self, part: SubBatch) -> SubBatch:
        assert self._later is not None
        return replace(part, ids=torch.from_numpy(sample_ids(self._later.index, part.ids.numpy())))


def open_lazy(
    options: LoaderOptions, shards: list[str], recipe: Recipe, world: dist.World, saved: dict[str, Any] | None
) -> TrainStream:
    """Returns the training stream of this rank; called by all ranks.

    One shard is walked before the first step, the first that holds samples: for the size of a sample and the
    widths of stored vectors. Raises ConfigError or DataError, the same on every rank.
    """
    _refuse(options, shards)
    work = Indexing(shards, options.index_dir, options.storage)
    head = _head(work, world)
    lanes, chunk, window = order_sizes(
        head,
        head.num_samples * len(shards),
        SPARSE_STRIDE if head.num_samples * len(shards) > DENSE_SAMPLES else 1,
        options,
        world,
        saved,
    )
    order = _shard_order(len(shards), (lanes, chunk * window), head, options, world, saved)
    widths = stored_widths(
        first_samples(head, ShardBytes(head, options.storage)), recipe.stored, options.max_consecutive
    )
    recipe = replace(recipe.for_pairs(sys.maxsize), widths=widths)
    sizes = {"lanes": lanes, "chunk_size": chunk, "window_chunks": window}
    sizes |= {"first_lanes": order.lanes, "first_window": order.window}
    names = "\n".join(posixpath.basename(shard.partition("?")[0]) for shard in work.shards)
    position = {
        "order_version": ORDER_VERSION,
        "exact": True,
        "index": "lazy",
        "seed": options.seed,
        "batch_size": options.batch_size,
        **sizes,
        "shards_sha": hashlib.blake2b(names.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest(),
        "num_samples": None,
        "index_sha": None,
    }
    banner = {
        "samples": None,
        "shards": len(shards),
        "exact": True,
        "order": "shard-level in the first epoch",
    }
    block = max(1 << 16, int(order.window * head.sample_bytes))
    reader = LaneReader(work.shards, order, recipe, options, work.records(), block)
    stream = LazyStream(reader, recipe, options, world, position, {**banner, **sizes, "index": "lazy"})
    if saved is not None and saved.get("first_steps") is not None:
        stream.adopt(None, int(saved["first_steps"]))
    elif saved is not None:
        reader.hold({int(shard): Passed(*how) for shard, how in saved.get("passed", {}).items()})
    return stream


def _refuse(options: LoaderOptions, shards: list[str]) -> None:
    streamed = [shard for shard in shards if needs_stream(shard)]
    if streamed:
        raise ConfigError(
            f"data.index: lazy, but {streamed[0]} cannot be indexed at all",
            "use plain .tar files, or leave data.index out: such shards are read as a stream (exact: false)",
        )
    if options.max_lost_chunks:
        raise ConfigError(
            "data.max_lost_chunks does not go with data.index: lazy, which finds the samples by reading",
            "leave one of the two out",
        )
    if options.on_no_range != "refuse":
        raise ConfigError(
            f"data.on_no_range: {options.on_no_range} does not go with data.index: lazy",
            "leave one of the two out",
        )


def _head(work: Indexing, world: dist.World) -> Index:
    """The index of the first shard that holds samples, from the main rank."""

    def look() -> tuple[int, ShardScan] | None:
        if not world.is_main and dist.World.current().size > 1:
            return None
        # Local shards that are missing are all named now; remote ones cost a request each.
        work.fingerprints([at for at, shard in enumerate(work.shards) if not is_remote(shard)])
        for number in range(len(work.shards)):
            (scan,) = work.walk([number])
            if len(scan.starts) > 1:
                return number, scan
        raise DataError(
            f"no sample in {len(work.shards)} shard(s), first {work.shards[0]}",
            "give shards that hold samples",
        )

    number, scan = next(found for found in dist.gather_objects(together(look)) if found is not None)
    return assemble([work.shards[number]], [scan])


def _shard_order(
    num_shards: int,
    later: tuple[int, int],
    head: Index,
    options: LoaderOptions,
    world: dist.World,
    saved: dict[str, Any] | None,
) -> ShardOrder:
    """The order of the first epoch. later: lanes of the later ones, and samples in a window of each."""
    if saved is not None and saved.get("first_lanes"):
        lanes, window = int(saved["first_lanes"]), int(saved["first_window"])
    else:
        # Raises when the processes do not divide the lanes at all.
        RowRanges(options.batch_size, later[0], world, options.workers)
        found = first_lanes(num_shards, later[0], world.size)
        if found is None:
            raise ConfigError(
                f"data.index: lazy gives every process shards of its own, and {num_shards} shard(s) are too "
                f"few for {world.size} processes",
                "leave data.index out: so few shards are indexed quickly",
            )
        lanes = found
        # Half of the bytes: a lane also holds what it has read ahead.
        affordable = options.window_bytes / 2 / head.sample_bytes / (lanes // world.size)
        window = max(1, int(min(later[1] * (later[0] // lanes), affordable)))
    if saved is None or saved.get("first_steps") is None:
        # Raises with the numbers of processes that can read the first epoch.
        RowRanges(options.batch_size, lanes, world, options.workers)
    return ShardOrder(num_shards, options.batch_size, lanes, window, options.seed)
