"""The training stream: from a description of the data to this rank's rows of every global batch.

Worker j of a rank builds a fixed range of its rows, whole lanes where there are enough of them; the main
process puts the ranges together in lane order. Only the ranges depend on the number of ranks and workers.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from clipkit import dist
from clipkit.data.caption_survey import CaptionSurvey, survey_captions
from clipkit.data.captions import DRAWN, CaptionRules
from clipkit.data.held_pairs import HeldOut, HeldPairs, read_held
from clipkit.data.holdout import kept_samples
from clipkit.data.http_ranges import NoRanges
from clipkit.data.mixture_survey import MixtureSurvey
from clipkit.data.options import CaptionField, LoaderOptions, Source
from clipkit.data.order import ORDER_VERSION, Order, divisors
from clipkit.data.position import PositionChangedError, check_position, order_sizes
from clipkit.data.ranges import RowRanges
from clipkit.data.rejects import RejectBudget
from clipkit.data.remote import ShardBytes
from clipkit.data.rows import Recipe, SubBatch, merge
from clipkit.data.shared_index import shared_index
from clipkit.data.source import expand_shards, needs_stream
from clipkit.data.targets import stored_widths
from clipkit.data.text import TextView
from clipkit.data.views import ImageView
from clipkit.data.waiting import together
from clipkit.data.window import WindowReader, first_samples
from clipkit.data.workers import RowReader, built_parts
from clipkit.types import Batch, ConfigError

__all__ = ["CaptionField", "LoaderOptions", "RejectBudget", "Source", "TrainStream", "open_train"]


class TrainStream:
    """This rank's rows of the global batches of a run.

    num_samples      samples in the set; None while that is not known
    steps_per_epoch  N // B, the same on every rank
    exact            whether order and position are exact (see `state`)
    changed          why the saved position was not continued, None where it was
    held             what is held out of every source, () for nothing
    on_indexing      called with a line when the first epoch of `data.index: lazy` is over and what is left of
                     the set is about to be indexed, which may take long
    survey           counts captions and those that repeat, where they are read and can be found by an index
    """

    changed: str | None = None
    held: tuple[HeldOut, ...] = ()
    survey: Callable[[], CaptionSurvey | MixtureSurvey] | None = None

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
        self._shift = 0
        self.on_indexing: Callable[[str], None] = _say_nothing
        self.num_samples: int | None = position["num_samples"]
        self.steps_per_epoch: int | None = None
        if self.num_samples is not None:
            self.steps_per_epoch = self.num_samples // options.batch_size
        self.exact = bool(position["exact"])
        # Workers ignore the first SIGTERM, which multiprocessing sends at exit before it waits for them.
        atexit.register(_close, weakref.ref(self))

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Yields this rank's rows of the global batches of steps start..stop-1.

        Step s takes batch s of the order, whose epoch is s // steps_per_epoch (see `renumber`). One set of
        workers serves the whole range. Does not touch the global random generators.
        """
        self.close()
        running = self._batches(start_step + self._shift, stop_step + self._shift)
        self._running = running
        return running

    def renumber(self, step: int, epoch: int, batch_in_epoch: int, config_seed: int) -> None:
        """Lets `step` of the run take that batch of `epoch`; changes what `batches` and `state` return.

        config_seed: what the configuration says, where the order has a seed of its own since.
        """
        self._shift = self._batch_number(epoch, batch_in_epoch) - step
        self._position["config_seed"] = config_seed

    def _batch_number(self, epoch: int, batch_in_epoch: int) -> int:
        """The number of a batch of the order, counted over all epochs."""
        assert self.steps_per_epoch is not None
        return epoch * self.steps_per_epoch + batch_in_epoch

    def _batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        with closing(built_parts(self._reader, self._ranges, self._options, start_step, stop_step)) as steps:
            for parts in steps:
                yield self._merged(parts)

    def _merged(self, parts: Sequence[SubBatch | None]) -> Batch:
        built = merge([part for part in parts if part is not None], self._recipe)
        batch = replace(built, shares=self._ranges.shares)
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def state(self, step: int) -> dict[str, Any]:
        """Returns the JSON-able position before global batch `step`, and what defines the order.

        Called by all ranks.
        """
        assert self.steps_per_epoch is not None
        epoch, within = divmod(step + self._shift, self.steps_per_epoch)
        position = {**self._position, "step": step, "epoch": epoch, "batch_in_epoch": within}
        return position | ({"processes": self.describe_worlds()} if self.exact else {})

    def ends_epoch(self, step: int) -> bool:
        """Returns whether the batch before step `step` of the run is known to have ended an epoch."""
        assert self.steps_per_epoch is not None
        return (step + self._shift) % self.steps_per_epoch == 0

    def describe_sources(self, total_steps: int) -> list[str]:
        """Returns a line about each source of a mixture in a run of so many steps."""
        return []

    @property
    def pairs(self) -> int:
        """The size of the set that defaults go by, the same throughout a run."""
        assert self.num_samples is not None
        return self.num_samples

    def held_pairs(self) -> list[HeldPairs]:
        """Returns the pairs that are held out, read from the shards; called by all ranks."""
        return [read_held(held, self._options) for held in self.held]

    def summary(self) -> str:
        """Returns a line about size and order."""
        exact = "exact order" if self.exact else "exact: false (this source cannot be indexed)"
        held = sum(len(source.kept.held) for source in self.held)
        besides = f" ({held:,} more are held out)" if held else ""
        return f"{self.num_samples:,} samples{besides}, {self.steps_per_epoch:,} steps per epoch, {exact}"

    def check_state(self, saved: dict[str, Any]) -> None:
        """Raises PositionChangedError naming the keys in which a saved position differs."""
        check_position(saved, self._position)

    def note_contents(self, contents: Sequence[str]) -> None:
        """Puts into `state` what the shards of raw data hold, "" for other sources; changes nothing else."""
        if any(contents):
            self._position["contents"] = list(contents)

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
    def counted(self) -> tuple[str, ...]:
        """The names that `Batch.counts` may hold."""
        return self._recipe.captions.counted

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


def _say_nothing(_: str) -> None:
    return None


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
    recipes = [
        Recipe(
            tuple(image_views),
            tuple(text_views),
            CaptionRules(source.captions, source.missing),
            options.max_pixels,
            options.seed,
            tuple(labels),
            tuple(stored),
        )
        for source in options.sources
    ]
    stream = _open(options, recipes, world, saved)
    stream.note_contents([source.content for source in options.sources])
    if saved is not None:
        stream.check_state(saved)
    return stream


def _open(
    options: LoaderOptions, recipes: Sequence[Recipe], world: dist.World, saved: dict[str, Any] | None
) -> TrainStream:
    lazy = options.index == "lazy"
    if saved is not None and (saved.get("index") == "lazy") != lazy:
        raise PositionChangedError(
            f"this run was begun with data.index: {'eager' if lazy else 'lazy'}",
            "set data.index to that, or start a new run directory",
        )
    if len(recipes) > 1:
        from clipkit.data.mixture_stream import open_mixture

        return open_mixture(options, recipes, world, saved)
    (source,), (recipe,) = options.sources, recipes
    shards: list[str] = together(lambda: expand_shards(source.shards, allow_pipe=options.allow_pipe))
    if lazy:
        from clipkit.data.lazy import open_lazy

        return open_lazy(options, shards, recipe, world, saved)
    if any(needs_stream(shard) for shard in shards):
        return _open_stream(options, shards, recipe, world)
    try:
        return _open_indexed(options, shards, recipe, world, saved)
    except NoRanges:
        if options.on_no_range != "stream":
            raise
        return _open_stream(options, shards, recipe, world)


def _open_stream(options: LoaderOptions, shards: list[str], recipe: Recipe, world: dist.World) -> TrainStream:
    from clipkit.data.stream import open_stream

    if options.holdout is not None:
        raise ConfigError(
            "data.holdout needs an index, and these shards are read as a stream (exact: false)",
            "use plain .tar files, or leave data.holdout out and evaluate on a set of its own (run.evaluate)",
        )
    return open_stream(options, shards, recipe, world)


def _open_indexed(
    options: LoaderOptions, shards: list[str], recipe: Recipe, world: dist.World, saved: dict[str, Any] | None
) -> TrainStream:
    index = shared_index(shards, options, world)
    kept = kept_samples(index, options)
    source = ShardBytes(index, options.storage)
    sizes = order_sizes(index, kept.num_samples, index.stride, options, world, saved)
    order = Order(kept.counts, options.batch_size, *sizes, options.seed)
    widths = stored_widths(first_samples(index, source), recipe.stored, options.max_consecutive)
    recipe = replace(recipe.for_pairs(kept.num_samples), widths=widths)
    lanes = {"lanes": order.lanes, "chunk_size": order.chunk_size, "window_chunks": order.window_chunks}
    position = {
        "order_version": ORDER_VERSION,
        "exact": True,
        "seed": options.seed,
        "batch_size": options.batch_size,
        **lanes,
        "num_samples": kept.num_samples,
        "index_sha": index.sha,
        **({"held_out": kept.sha} if kept.sha else {}),
    }
    banner = {
        "samples": kept.num_samples,
        "shards": len(shards),
        "exact": True,
        **lanes,
        "ignored_members": index.ignored,
        "index": index.file or "in memory",
        **({"held_out": len(kept.held)} if kept.sha else {}),
    }
    stream = TrainStream(
        WindowReader(kept, order, recipe, options, source),
        RowRanges(options.batch_size, order.lanes, world, options.workers, options.uneven),
        recipe,
        options,
        position,
        banner,
    )
    if kept.sha:
        stream.held = (HeldOut(kept, options.sources[0].captions),)
    if DRAWN in recipe.sources:
        stream.survey = partial(survey_captions, kept, source, recipe.captions, options.seed)
    return stream
