"""Rows of a batch: a good sample for every slot, and its views under the slot's own seed, as tensors."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipkit.data.captions import DRAWN, CaptionRules, CaptionSource, SlotCaptions, label_source, slot_key
from clipkit.data.order import hash_key, mix
from clipkit.data.sample import Absent, RawSample, decode_image, image_bytes
from clipkit.data.targets import Vector, caption_label, field_label, stored_vector
from clipkit.data.text import ABSENT_CAPTION, EDA, TextView
from clipkit.data.text_edits import eda
from clipkit.data.views import ImageView
from clipkit.types import Batch, ConfigError, Reject


class Content(NamedTuple):
    """What is needed of one sample: the image if any view reads it, captions by source (None: absent),
    labels and stored vectors in the order of the recipe, and what counts where its caption came from.
    """

    image: Image.Image | None
    captions: dict[CaptionSource, str | None]
    labels: tuple[int, ...] = ()
    stored: tuple[Vector, ...] = ()
    counted: tuple[str, ...] = ()


class Row(NamedTuple):
    """One usable sample in its slot."""

    slot: int
    sample_id: int
    key: str
    content: Content
    rejects: tuple[Reject, ...] = ()


class Passed(NamedTuple):
    """How far a shard was read: samples, the hash of their headers, and whether these are all of them."""

    samples: int
    digest: str
    whole: bool


@dataclass(frozen=True)
class SubBatch:
    """What one worker built of one step: rows in slot order, texts not trimmed yet, each text once.

    retries  failed reads that were followed by another attempt
    counts   how often each of the recipe's `counted` applied
    passed   number of a shard -> how far it was read, of those read for this step without an index
    """

    images: dict[str, Tensor]
    texts: dict[str, Tensor]
    ids: Tensor
    slots: Tensor
    keys: tuple[str, ...]
    rejects: tuple[Reject, ...]
    labels: dict[str, Tensor]
    stored: dict[str, Tensor]
    present: dict[str, Tensor]
    retries: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    passed: dict[int, Passed] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How a raw sample becomes a row. Picklable; the same in every worker.

    Members that nothing here names need not exist. captions: where the source has its captions; labels:
    "caption", "caption:FIELD" or fields; stored: .npy members, each of the width in `widths`. Everything else
    is the same for all sources of a mixture, and so is what `build` makes of their rows.
    """

    image_views: tuple[ImageView, ...]
    text_views: tuple[TextView, ...]
    captions: CaptionRules
    max_pixels: int
    seed: int
    labels: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names = [view.name for view in self.image_views] + [view.name for view in self.text_views]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"two views are called {', '.join(twice)}", "give every view its own name")

    def for_pairs(self, num_pairs: int) -> Recipe:
        """Returns the recipe with open crop scales settled by the size of the set."""
        return replace(self, image_views=tuple(view.for_pairs(num_pairs) for view in self.image_views))

    @cached_property
    def sources(self) -> dict[CaptionSource, bool]:
        """Where captions are read -> whether every user of one can do without it."""
        found: dict[CaptionSource, bool] = {}
        for view in self.text_views:
            found[view.source] = view.optional and found.get(view.source, True)
        for label in self.labels:
            if (read := label_source(label)) is not None:
                found[read] = False
        return found

    @cached_property
    def shared_texts(self) -> dict[str, str]:
        """View name -> the first view with the same tokens: one caption is tokenised and sent once."""
        first: list[TextView] = []
        names: dict[str, str] = {}
        for view in self.text_views:
            alike = next((other for other in first if self._same_tokens(view, other)), view)
            if alike is view:
                first.append(view)
            names[view.name] = alike.name
        return names

    def _same_tokens(self, one: TextView, other: TextView) -> bool:
        edited = EDA in (one.recipe, other.recipe)
        return (
            one.source == other.source
            and one.tokenizer is other.tokenizer
            and (one.context_length, one.trim) == (other.context_length, other.trim)
            and (
                not edited or (one.recipe == other.recipe and _seed_name(one.name) == _seed_name(other.name))
            )
        )

    def prepare(self, sample: RawSample, epoch: int, slot: int) -> Content:
        """Returns what this slot needs of a sample, the cheap parts checked first. Raises Unusable."""
        captions: dict[CaptionSource, str | None] = {}
        read = SlotCaptions(self.captions, sample, slot_key(self.seed, epoch, slot))
        for source, optional in self.sources.items():
            try:
                captions[source] = read.caption(source)
            except Absent:
                if not optional:
                    raise
                captions[source] = None
        labels = tuple(self._label(sample, captions, name) for name in self.labels)
        stored = tuple(
            stored_vector(sample, name, width) for name, width in zip(self.stored, self.widths, strict=True)
        )
        image = decode_image(image_bytes(sample), self.max_pixels) if self.image_views else None
        return Content(image, captions, labels, stored, read.counted if captions.get(DRAWN) else ())

    def _label(self, sample: RawSample, captions: dict[CaptionSource, str | None], name: str) -> int:
        source = label_source(name)
        return field_label(sample, name) if source is None else caption_label(captions[source] or "")

    def build(self, epoch: int, slots: Sequence[int], rows: Iterable[Row]) -> SubBatch:
        """Returns the sub-batch of `rows`, one per slot. Leaves the three global generators as they were."""
        count = len(slots)
        images = {
            view.name: torch.empty((count, 3, *view.size), dtype=torch.uint8) for view in self.image_views
        }
        seeds = {view.name: slot_seeds(self.seed, epoch, view.name, slots) for view in self.image_views}
        taken: list[Row] = []
        with preserved_generators():
            for at, row in enumerate(rows):
                for view in self.image_views:
                    seed_generators(seeds[view.name][at])
                    assert row.content.image is not None
                    images[view.name][at] = view(row.content.image)
                taken.append(row._replace(content=row.content._replace(image=None)))
            contents = [row.content for row in taken]
            texts = {
                view.name: view.encode(self._captions(view, epoch, slots, contents))
                for view in self.text_views
                if self.shared_texts[view.name] == view.name
            }
        return SubBatch(
            images=images,
            texts=texts,
            ids=torch.tensor([row.sample_id for row in taken], dtype=torch.int64),
            slots=torch.tensor(slots, dtype=torch.int64),
            keys=tuple(row.key for row in taken),
            rejects=tuple(reject for row in taken for reject in row.rejects),
            labels={
                name: torch.tensor([content.labels[at] for content in contents], dtype=torch.int64)
                for at, name in enumerate(self.labels)
            },
            stored={
                name: torch.from_numpy(np.stack([content.stored[at] for content in contents]))
                for at, name in enumerate(self.stored)
            },
            present={
                view.name: torch.tensor([content.captions[view.source] is not None for content in contents])
                for view in self.text_views
                if view.optional
            },
            counts=dict(Counter(name for content in contents for name in content.counted)),
        )

    def _captions(
        self, view: TextView, epoch: int, slots: Sequence[int], contents: Sequence[Content]
    ) -> list[str]:
        found = [content.captions[view.source] for content in contents]
        if view.recipe == EDA:
            seeds = slot_seeds(self.seed, epoch, view.name, slots)
            found = [text and eda(text, random.Random(seed)) for text, seed in zip(found, seeds, strict=True)]
        return [text or ABSENT_CAPTION for text in found]


def slot_seeds(seed: int, epoch: int, view: str, slots: Sequence[int]) -> list[int]:
    """Returns a 63-bit seed per slot: a function of (seed, epoch, slot, view name) only.

    "image@big" is "image" for another tower and has its seeds, so that both see the same crop.
    """
    keys = mix(hash_key(seed, epoch, "view", _seed_name(view)), np.asarray(slots, dtype=np.int64) + 1)
    return [int(key) >> 1 for key in keys]


def _seed_name(view: str) -> str:
    return view.partition("@")[0]


def seed_generators(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's global CPU generators."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Restores the three global generators on leaving: without workers they also drive the dropout."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.default_generator.set_state(cpu)


def merge(parts: Sequence[SubBatch], recipe: Recipe) -> Batch:
    """Returns the batch of one rank from its workers' parts, in their order; texts are trimmed here, once."""
    texts: dict[str, Tensor] = {}
    for view in recipe.text_views:
        first = recipe.shared_texts[view.name]
        if first == view.name:
            texts[view.name] = view.trimmed(_joined([part.texts[view.name] for part in parts]))
        else:
            texts[view.name] = texts[first]
    return Batch(
        images=_joined_all([part.images for part in parts]),
        texts=texts,
        ids=_joined([part.ids for part in parts]),
        slots=_joined([part.slots for part in parts]),
        keys=tuple(key for part in parts for key in part.keys),
        stored=_joined_all([part.stored for part in parts]),
        labels=_joined_all([part.labels for part in parts]),
        present=_joined_all([part.present for part in parts]),
        rejects=tuple(reject for part in parts for reject in part.rejects),
        retries=sum(part.retries for part in parts),
        counts=dict(sum((Counter(part.counts) for part in parts), Counter())),
    )


def _joined_all(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: _joined([part[name] for part in parts]) for name in parts[0]}


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
