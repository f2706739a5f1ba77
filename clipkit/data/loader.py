"""The training stream: from a description of the data to this rank's rows of every global batch.

Worker j of a rank builds a fixed range of its rows, whole lanes where there are enough of them; the main
process puts the ranges together in lane order. Only the ranges depend on the number of ranks and workers.
"""

from __future__ import annotations

import atexit
import multiprocessing.connection
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from clipkit import dist
from clipkit.data.http_ranges import NoRanges
from clipkit.data.options import CaptionField, LoaderOptions, Source
from clipkit.data.order import ORDER_VERSION, Order, default_chunks, default_lanes, divisors
from clipkit.data.ranges import RowRanges
from clipkit.data.rejects import RejectBudget
from clipkit.data.remote import ShardBytes
from clipkit.data.rows import Recipe, SubBatch, merge
from clipkit.data.shared_index import shared_index
from clipkit.data.source import expand_shards, needs_stream
from clipkit.data.tar_index import Index
from clipkit.data.targets import stored_widths
from clipkit.data.text import TextView
from clipkit.data.views import ImageView
from clipkit.data.window import WindowReader, first_samples
from clipkit.types import Batch, ClipkitError, ConfigError

__all__ = ["CaptionField", "LoaderOptions", "RejectBudget", "Source", "TrainStream", "open_train"]

_STATE_KEYS = (
    "order_version", "exact", "seed", "batch_size", "lanes", "chunk_size", "window_chunks", "num_samples",
    "index_sha",
)  # fmt: skip


class RowReader(Protocol):
    """Builds rows of global batches; picklable, one copy per worker."""

    def sub_batch(self, step: int, first: int, end: int) -> SubBatch:
        """Returns rows first..end of global batch `step`."""


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker: raised there, torch would turn it into a RuntimeError."""

    error: ClipkitError


class _Steps(IterableDataset[Any]):
    """The sub-batches of one worker for steps start..stop."""

    def __init__(self, reader: RowReader, ranges: list[tuple[int, int]], start: int, stop: int) -> None:
        self.reader, self.ranges, self.start, self.stop = reader, ranges, start, stop

    def __iter__(self) -> Iterator[SubBatch | _Failure]:
        info = get_worker_info()
        first, end = self.ranges[info.id if info else 0]
        try:
            for step in range(self.start, self.stop):
                yield self.reader.sub_batch(step, first, end)
        except ClipkitError as error:
            yield _Failure(error)


def _unchanged(item: Any) -> Any:
    return item


def _prepare_worker(_: int) -> None:
    """Workers outlive the first Ctrl-C or SIGTERM, so that the main process can finish its step and save.

    They leave when told to, at a second SIGTERM, or when the main process is gone, however it went.
    """
    seen: list[int] = []

    def on_terminate(number: int, _: Any) -> None:
        if seen:
            os._exit(0)
        seen.append(number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_terminate)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """Torch's own watch compares process ids every 5 s and, under forkserver, watches the wrong process."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


class TrainStream:
    """This rank's rows of the global batches of a run.

    num_samples      samples in the set
    steps_per_epoch  N // B, the same on every rank
    exact            whether order and position are exact (see `state`)
    """

    def __init__(
        self,
        reader: RowReader,
        ranges: RowRanges,
        recipe: Recipe,
        options: LoaderOptions,
        position: dict[str, Any],
        banner: dict[str, Any],
    ) -> None:
        self._reader = reader
        self._ranges = ranges
        self._recipe = recipe
        self._options = options
        self._position = position
        self._banner = banner
        self._running: Any = None
        self.num_samples = int(position["num_samples"])
        self.steps_per_epoch = self.num_samples // options.batch_size
        self.exact = bool(position["exact"])
        # Workers ignore the first SIGTERM, which multiprocessing sends at exit before it waits for them.
        atexit.register(_close, weakref.ref(self))

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Yields this rank's rows of global batches start..stop-1; epoch = step // steps_per_epoch.

        One set of workers serves the whole range. Does not touch the global random generators.
        """
        self.close()
        running = self._batches(start_step, stop_step)
        self._running = running
        return running

    def _batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        ranges = self._ranges.of_workers()
        if not self._options.workers:
            steps: Any = iter(_Steps(self._reader, ranges, start_step, stop_step))
        else:
            steps = self._workers(_Steps(self._reader, ranges, start_step, stop_step))
        try:
            for _ in range(start_step, stop_step):
                parts = [self._next(steps) for _ in ranges]
                batch = replace(merge(parts, self._recipe), shares=self._ranges.shares)
                yield batch.pin_memory() if torch.cuda.is_available() else batch
        finally:
            # torch ends its workers in __del__, which fails when the iterator hangs in a traceback: the
            # garbage collector finalises the queues first, and the workers never hear of the end.
            end_workers = getattr(steps, "_shutdown_workers", None)
            if end_workers is not None:
                end_workers()

    def _workers(self, steps: _Steps) -> Iterator[SubBatch | _Failure]:
        context = multiprocessing.get_context(self._options.start_method)
        if context.get_start_method() == "forkserver":
            # Imported once in the server instead of once per worker; no effect on a server that runs already.
            context.set_forkserver_preload(["__main__", "clipkit.data.window"])
        with warnings.catch_warnings():
            # torch counts processors and warns; the number of workers was chosen by the user.
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            loader: DataLoader[Any] = DataLoader(
                steps,
                batch_size=None,
                num_workers=len(steps.ranges),
                collate_fn=_unchanged,
                worker_init_fn=_prepare_worker,
                prefetch_factor=self._options.prefetch,
                multiprocessing_context=context,
                # Without a generator of its own, iter() draws from the default one: the model's.
                generator=torch.Generator(),
            )
            return iter(loader)

    def _next(self, steps: Iterator[SubBatch | _Failure]) -> SubBatch:
        try:
            part = next(steps)
        except RuntimeError as error:
            # torch's own message about a lost worker; errors raised inside one begin with "Caught".
            if str(error).startswith("DataLoader worker"):
                raise ClipkitError(
                    str(error).splitlines()[0],
                    "a worker was lost, most often for memory: lower data.workers or data.window_bytes",
                ) from None
            raise
        if isinstance(part, _Failure):
            raise part.error
        return part

    def state(self, step: int) -> dict[str, Any]:
        """Returns the JSON-able position before global batch `step`, and what defines the order."""
        epoch, within = divmod(step, self.steps_per_epoch)
        position = {**self._position, "step": step, "epoch": epoch, "batch_in_epoch": within}
        return position | ({"processes": self.describe_worlds()} if self.exact else {})

    def check_state(self, saved: dict[str, Any]) -> None:
        """Raises ConfigError naming the differing keys when a saved position cannot be continued exactly."""
        differing = [key for key in _STATE_KEYS if saved.get(key) != self._position.get(key)]
        if differing:
            changes = ", ".join(f"{key}: {saved.get(key)} -> {self._position.get(key)}" for key in differing)
            raise ConfigError(
                f"the saved position in the data cannot be continued, it differs in {changes}",
                "bring back the same shards and settings, or start a new run directory",
            )

    def world_sizes(self) -> list[int]:
        """Returns the numbers of processes that continue this run exactly, with equal shares."""
        return divisors(self._ranges.lanes) if self.exact else [self._ranges.world.size]

    def describe_worlds(self) -> str:
        """Returns which numbers of processes continue this run, in words for dry runs and checkpoints."""
        sizes = ", ".join(map(str, self.world_sizes()))
        if not self.exact or len(self.world_sizes()) == self._ranges.lanes:
            return sizes
        return f"{sizes}; with data.uneven=true any number up to {self._ranges.lanes}"

    @property
    def shares(self) -> tuple[int, ...]:
        """The rows of a global batch on every rank, () where all hold equally many."""
        return self._ranges.shares

    def describe(self) -> dict[str, Any]:
        """Returns what the banner prints: counts, sizes, where the index lies, whether the order is exact."""
        crops = {
            view.name: list(view.scale) for view in self._recipe.image_views if view.train and view.scale
        }
        return {
            **self._banner,
            "steps_per_epoch": self.steps_per_epoch,
            "world_sizes": self.world_sizes(),
            "workers": self._options.workers,
            "crop_scale": crops,
            "labels": list(self._recipe.labels),
            "stored": self.stored_widths,
        }

    @property
    def stored_widths(self) -> dict[str, int]:
        """The width Dn of every stored vector."""
        return dict(zip(self._recipe.stored, self._recipe.widths, strict=True))

    def close(self) -> None:
        """Ends the workers."""
        running, self._running = self._running, None
        if running is not None:
            running.close()


def _close(stream: weakref.ref[TrainStream]) -> None:
    alive = stream()
    if alive is not None:
        alive.close()


def open_train(
    options: LoaderOptions,
    image_views: Sequence[ImageView],
    text_views: Sequence[TextView],
    world: dist.World,
    *,
    saved: dict[str, Any] | None = None,
    labels: Sequence[str] = (),
    stored: Sequence[str] = (),
) -> TrainStream:
    """Returns the training stream of this rank; called by all ranks.

    saved   the data position of a checkpoint. Lanes, chunks and windows come from it: fixed for a run.
    labels  "caption", "caption:FIELD" (equal captions are equal numbers) or fields, such as "json.category"
    stored  extensions of members that hold a vector, for example "teacher_image.npy"
    Samples need the members that are named by the views, labels and stored vectors, and no others.
    Raises ConfigError or DataError, the same on every rank.
    """
    if len(options.source.captions) != 1:
        raise ConfigError(
            f"data.train has {len(options.source.captions)} caption fields; this version reads one",
            "keep one entry in data.train.captions",
        )
    shards = expand_shards(options.source.shards, allow_pipe=options.allow_pipe)
    recipe = Recipe(
        tuple(image_views),
        tuple(text_views),
        options.source.captions[0].field,
        options.max_pixels,
        options.seed,
        tuple(labels),
        tuple(stored),
    )
    if any(needs_stream(shard) for shard in shards):
        stream = _open_stream(options, shards, recipe, world)
    else:
        try:
            stream = _open_indexed(options, shards, recipe, world, saved)
        except NoRanges:
            if options.on_no_range != "stream":
                raise
            stream = _open_stream(options, shards, recipe, world)
    if saved is not None:
        stream.check_state(saved)
    return stream


def _open_stream(options: LoaderOptions, shards: list[str], recipe: Recipe, world: dist.World) -> TrainStream:
    from clipkit.data.stream import open_stream

    return open_stream(options, shards, recipe, world)


def _open_indexed(
    options: LoaderOptions, shards: list[str], recipe: Recipe, world: dist.World, saved: dict[str, Any] | None
) -> TrainStream:
    index = shared_index(shards, options, world)
    source = ShardBytes(index, options.storage)
    order = _order(index, options, world, saved)
    widths = stored_widths(first_samples(index, source), recipe.stored, options.max_consecutive)
    recipe = replace(recipe.for_pairs(index.num_samples), widths=widths)
    lanes = {"lanes": order.lanes, "chunk_size": order.chunk_size, "window_chunks": order.window_chunks}
    position = {
        "order_version": ORDER_VERSION,
        "exact": True,
        "seed": options.seed,
        "batch_size": options.batch_size,
        **lanes,
        "num_samples": index.num_samples,
        "index_sha": index.sha,
    }
    banner = {
        "samples": index.num_samples,
        "shards": len(shards),
        "exact": True,
        **lanes,
        "ignored_members": index.ignored,
        "index": index.file or "in memory",
    }
    return TrainStream(
        WindowReader(index, order, recipe, options, source),
        RowRanges(options.batch_size, order.lanes, world, options.workers, options.uneven),
        recipe,
        options,
        position,
        banner,
    )


def _order(index: Index, options: LoaderOptions, world: dist.World, saved: dict[str, Any] | None) -> Order:
    window_samples = options.window_bytes / max(1.0, index.sample_bytes)
    if saved is not None and saved.get("lanes"):
        lanes, chunk, window = (int(saved[key]) for key in ("lanes", "chunk_size", "window_chunks"))
        if options.lanes not in (None, lanes):
            raise ConfigError(
                f"data.lanes={options.lanes}, but this run was started with {lanes}",
                f"set data.lanes={lanes} or leave it out",
            )
    else:
        lanes = options.lanes or default_lanes(options.batch_size, world.size, window_samples, options.uneven)
        chunk, window = default_chunks(
            index.num_samples, lanes, -(-lanes // world.size), window_samples, index.stride
        )
    return Order(index.counts, options.batch_size, lanes, chunk, window, options.seed)
