"""An evaluation set in memory: images by reference, labels or captions in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipkit.evaluation.images import Images
from clipkit.evaluation.prompts import ClassNames, check_count, check_order, load_classnames
from clipkit.types import ConfigError, DataError


@dataclass(frozen=True)
class ClassificationSet:
    """Images with one label each.

    kind        "csv", "webdataset", "imagefolder" or "idx"
    labels      int64 (N,), zero-based
    names       class names the data brings itself, None when it brings none
    templates   templates the data brings itself, or None
    folders     class folders in label order (ImageFolder only)
    wordnet     True when the folders are WordNet ids, named after ImageNet
    split       the split that was read, where the layout has splits
    """

    name: str
    kind: str
    source: str
    images: Images
    labels: np.ndarray
    names: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    folders: tuple[str, ...] | None = None
    wordnet: bool = False
    split: str | None = None

    def __post_init__(self) -> None:
        _require(len(self.images), "images", self.source)

    def classnames(self, given: ClassNames = None) -> tuple[str, ...]:
        """Returns one name per class: `given` (a file, a list or "imagenet") or the names of the data.

        Raises DataError when count or order do not match the data, ConfigError when there are no names.
        """
        loaded = load_classnames(given, self.folders)
        if loaded is None:
            if self.names is None:
                raise ConfigError(
                    f"{self.source}: the data has labels but no class names",
                    "put classnames.txt beside the labels, or pass --classnames FILE",
                )
            names, source = self.names, self.source
        else:
            names, source = loaded
            if self.names is not None:
                check_count(names, len(self.names), source, self.source)
                check_order(names, self.names, source)
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= len(names)))
        if len(outside):
            row = int(outside[0])
            raise DataError(
                f"{self.images.name(row)}: label {self.labels[row]}, but {source} has {len(names)} names",
                "give exactly one name per class, in label order; labels count from 0",
            )
        return names


@dataclass(frozen=True)
class RetrievalSet:
    """Images with any number of captions each.

    captions, owners   the captions and, int64 (M,), the image each belongs to, in order of the images
    empty_captions     how many captions were empty and are left out
    """

    name: str
    kind: str
    source: str
    images: Images
    captions: tuple[str, ...]
    owners: np.ndarray
    empty_captions: int = 0
    split: str | None = None

    def __post_init__(self) -> None:
        _require(len(self.images), "images", self.source)
        _require(len(self.captions), "captions", self.source)


def _require(number: int, what: str, source: str) -> None:
    if number == 0:
        raise DataError(f"{source}: no {what} found", f"point the command at data that has {what}")


def retrieval_set(
    name: str, kind: str, source: str, images: Images, captions: Sequence[Sequence[str]], split: str | None
) -> RetrievalSet:
    """Returns the set for `captions`, one list per image; empty captions are left out and counted."""
    kept = [(text, row) for row, texts in enumerate(captions) for text in texts if text.strip()]
    return RetrievalSet(
        name=name,
        kind=kind,
        source=source,
        images=images,
        captions=tuple(text.strip() for text, _ in kept),
        owners=np.array([row for _, row in kept], dtype=np.int64),
        empty_captions=sum(len(texts) for texts in captions) - len(kept),
        split=split,
    )
