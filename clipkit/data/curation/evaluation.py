"""What must not be trained on: pictures of evaluation sets, and samples of other shards."""

from __future__ import annotations

import glob
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipkit.data.curation.hashes import PHASH, perceptual_hash
from clipkit.data.curation.selection import unusable_rows
from clipkit.data.curation.survey import Survey, key_of
from clipkit.data.curation.tables import shard_labels
from clipkit.data.engine import Engine
from clipkit.data.source import scheme_of


class Pictures(Protocol):
    """A sequence of pictures with names, as evaluation sets hold them; picklable."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str:
        """Returns how a message calls picture `index`."""
        ...

    def load(self, index: int) -> Image.Image:
        """Returns the decoded picture."""
        ...


class Named(Protocol):
    """What is known by a name, one after the other."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str:
        """Returns how a list calls picture `index`."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """Pictures that must not be trained on.

    parts     what names them, one part after the other
    hashes    uint64 (E,); hashed: which of the pictures have one
    vectors   unit vectors float32 (E, D), None without a model
    unusable  samples of shards that could not be decoded, and so are not compared
    """

    parts: tuple[Named, ...]
    hashes: NDArray[np.uint64]
    hashed: NDArray[np.bool_]
    vectors: NDArray[np.float32] | None = None
    unusable: int = 0

    def name(self, index: int) -> str:
        """Returns how lists call picture `index`."""
        starts = [0, *accumulate(map(len, self.parts))]
        part = bisect_right(starts, index) - 1
        return self.parts[part].name(index - starts[part])

    def joined(self, other: Evaluation) -> Evaluation:
        """Returns the pictures of both."""
        vectors = [each.vectors for each in (self, other) if each.vectors is not None and len(each.hashes)]
        return Evaluation(
            (*self.parts, *other.parts),
            np.concatenate([self.hashes, other.hashes]),
            np.concatenate([self.hashed, other.hashed]),
            np.concatenate(vectors) if vectors else None,
            self.unusable + other.unusable,
        )


def hash_pictures(pictures: Pictures, start: int, stop: int) -> list[int | None]:
    """Returns the perceptual hashes of pictures start..stop; raises DataError for an unreadable one."""
    return [perceptual_hash(pictures.load(index)) for index in range(start, stop)]


def evaluation_of(
    sets: Sequence[Pictures], engine: Engine, vectors: Sequence[NDArray[np.float32]] | None = None
) -> Evaluation:
    """Returns the pictures of all sets with their hashes, and with `vectors`, one array (E, D) per set."""
    step = 256
    parts = (
        (pictures, start, min(start + step, len(pictures)))
        for pictures in sets
        for start in range(0, len(pictures), step)
    )
    found = [value for part in engine.map(hash_pictures, parts) for value in part]
    hashed = np.array([value is not None for value in found], dtype=np.bool_)
    hashes = np.array([value or 0 for value in found], dtype=np.uint64)
    return Evaluation(tuple(sets), hashes, hashed, np.concatenate(vectors) if vectors else None)


@dataclass(frozen=True)
class _Samples:
    """The samples of one shard, whose keys lie in a file."""

    label: str
    survey: Survey
    kind: str
    number: int

    def __len__(self) -> int:
        return len(self.survey.rows(self.kind, self.number))

    def name(self, index: int) -> str:
        return f"{self.label}/{key_of(self.survey.rows(self.kind, self.number)['key'][index])}"


def samples_of(survey: Survey, hashes: str, vectors: str | None = None) -> Evaluation:
    """Returns the samples of surveyed shards; hashes, vectors: the kinds of rows that hold them."""
    numbers = range(len(survey.shards))
    rows = [survey.rows(hashes, number) for number in numbers]
    found: NDArray[np.float32] | None = None
    if vectors is not None:
        parts = [
            survey.rows(vectors, number, "vectors")
            for number, each in zip(numbers, rows, strict=True)
            if len(each)
        ]
        # What could not be embedded is like nothing.
        found = np.nan_to_num(np.concatenate(parts)) if parts else None
    return Evaluation(
        tuple(_Samples(label, survey, hashes, n) for n, label in enumerate(shard_labels(survey.shards))),
        np.concatenate([np.asarray(each[PHASH]) for each in rows]),
        np.concatenate([~np.asarray(each["flat"]) for each in rows]),
        found,
        sum(int(unusable_rows(each).sum()) for each in rows),
    )


def names_shards(data: str) -> bool:
    """Returns whether DATA names plain shards: a .tar, a list or pattern of them, an address, or a folder
    that holds them and is none of CLIP_benchmark.
    """
    if scheme_of(data):
        return True
    path = Path(data).expanduser()
    if path.is_dir():
        layout = any(path.glob("*/nshards.txt")) or (path / "nshards.txt").is_file()
        return not layout and any(path.glob("*.tar"))
    if not os.path.exists(data) and (glob.has_magic(data) or "{" in data):
        return True
    return path.suffix.lower() in (".tar", ".txt", ".list")
