"""Rows of a batch: a good sample for every slot, and its views under the slot's own seed, as tensors."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipkit.data.order import hash_key, mix
from clipkit.data.sample import RawSample, caption, decode_image, image_bytes
from clipkit.data.text import TextView
from clipkit.data.views import ImageView
from clipkit.types import Batch, Reject


class Row(NamedTuple):
    """One usable sample in its slot. `image` or `caption` is None when no view needs it."""

    slot: int
    sample_id: int
    key: str
    image: Image.Image | None
    caption: str | None
    rejects: tuple[Reject, ...] = ()


@dataclass(frozen=True)
class SubBatch:
    """What one worker built of one step: rows in slot order, texts not trimmed yet."""

    images: dict[str, Tensor]
    texts: dict[str, Tensor]
    ids: Tensor
    slots: Tensor
    keys: tuple[str, ...]
    rejects: tuple[Reject, ...]


@dataclass(frozen=True)
class Recipe:
    """How a raw sample becomes a row. Picklable; the same in every worker."""

    image_views: tuple[ImageView, ...]
    text_views: tuple[TextView, ...]
    caption_field: str
    max_pixels: int
    seed: int

    def for_pairs(self, num_pairs: int) -> Recipe:
        """Returns the recipe with open crop scales settled by the size of the set."""
        return replace(self, image_views=tuple(view.for_pairs(num_pairs) for view in self.image_views))

    def prepare(self, sample: RawSample) -> tuple[Image.Image | None, str | None]:
        """Returns (image, caption), each None when no view needs it. Raises Unusable."""
        text = caption(sample, self.caption_field) if self.text_views else None
        image = decode_image(image_bytes(sample), self.max_pixels) if self.image_views else None
        return image, text

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
                    assert row.image is not None
                    images[view.name][at] = view(row.image)
                taken.append(row._replace(image=None))
            texts = {view.name: view.encode([row.caption or "" for row in taken]) for view in self.text_views}
        return SubBatch(
            images=images,
            texts=texts,
            ids=torch.tensor([row.sample_id for row in taken], dtype=torch.int64),
            slots=torch.tensor(slots, dtype=torch.int64),
            keys=tuple(row.key for row in taken),
            rejects=tuple(reject for row in taken for reject in row.rejects),
        )


def slot_seeds(seed: int, epoch: int, view: str, slots: Sequence[int]) -> list[int]:
    """Returns a 63-bit seed per slot: a function of (seed, epoch, slot, view name) only."""
    keys = mix(hash_key(seed, epoch, "view", view), np.asarray(slots, dtype=np.int64) + 1)
    return [int(key) >> 1 for key in keys]


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


def merge(parts: Sequence[SubBatch], text_views: Sequence[TextView]) -> Batch:
    """Returns the batch of one rank from its workers' parts, in their order; texts are trimmed here, once."""
    first = parts[0]
    texts = {view.name: _joined([part.texts[view.name] for part in parts]) for view in text_views}
    return Batch(
        images={name: _joined([part.images[name] for part in parts]) for name in first.images},
        texts={view.name: view.trimmed(texts[view.name]) for view in text_views},
        ids=_joined([part.ids for part in parts]),
        slots=_joined([part.slots for part in parts]),
        keys=tuple(key for part in parts for key in part.keys),
        rejects=tuple(reject for part in parts for reject in part.rejects),
    )


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
