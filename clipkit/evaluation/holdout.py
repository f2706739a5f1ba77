"""Pairs held out of the training shards, as a retrieval set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from clipkit.data.held_pairs import HeldPairs
from clipkit.data.remote import ShardBytes
from clipkit.data.sample import RawSample, Unusable, decode_image, image_bytes
from clipkit.data.window import read_samples
from clipkit.evaluation.images import unreadable
from clipkit.evaluation.sets import RetrievalSet, retrieval_set
from clipkit.types import DataError

HOLDOUT = "holdout"


@dataclass
class HeldImages:
    """Pictures of held-out pairs, of all sources one after the other, read from their shards."""

    sources: Sequence[HeldPairs]
    _bytes: list[ShardBytes] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._bytes = [ShardBytes(source.index, source.storage) for source in self.sources]
        self._ends = np.cumsum([len(source.ids) for source in self.sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[int, int]:
        """Returns (source, id of the sample there)."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        source = self.sources[number]
        return number, source.ids[index - int(self._ends[number])]

    def _read(self, index: int) -> RawSample:
        number, sample = self._place(index)
        held = self.sources[number].index
        return read_samples(held, self._bytes[number], *held.locate(sample), 1)[sample]

    def name(self, index: int) -> str:
        """Returns shard and position."""
        number, sample = self._place(index)
        held = self.sources[number].index
        shard, position = held.locate(sample)
        return f"{held.shards[shard]}: sample {position}"

    def load(self, index: int) -> Image.Image:
        """Returns the decoded picture."""
        sample = self._read(index)
        try:
            return decode_image(image_bytes(sample), self.sources[self._place(index)[0]].max_pixels)
        except Unusable as error:
            raise unreadable(
                f"{self.name(index)} ({sample.key})", f"{error.reason}: {error.detail}"
            ) from error


def holdout_notes(sources: Sequence[HeldPairs]) -> list[str]:
    """Returns a line for the banner about the pairs that are held out, and one about those left out."""
    pairs = sum(len(source.ids) for source in sources)
    texts = sum(len(texts) for source in sources for texts in source.captions)
    refused = [entry for source in sources for entry in source.refused]
    lines = [f"holdout: {pairs:,} pairs with {texts:,} captions, evaluated as retrieval"] if pairs else []
    if refused:
        reasons = Counter(entry.reason for entry in refused)
        counted = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        lines.append(
            f"{len(refused):,} more held-out pairs cannot be used and are left out ({counted}), the first: "
            f"{refused[0].key} in {refused[0].shard}"
        )
    return lines


def holdout_set(sources: Sequence[HeldPairs]) -> RetrievalSet:
    """Returns the set of all pairs that are held out; raises DataError when none of them can be used."""
    refused = [entry for source in sources for entry in source.refused]
    captions = [texts for source in sources for texts in source.captions]
    if not captions:
        first = refused[0]
        raise DataError(
            f"none of the {len(refused)} held-out pairs can be used, the first: {first.key} in {first.shard} "
            f"({first.reason}: {first.detail})",
            "repair the shards, or correct data.train captions",
        )
    return retrieval_set(HOLDOUT, "webdataset", "data.holdout", HeldImages(sources), captions, None)
