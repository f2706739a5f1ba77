"""Pictures of evaluation sets, which must not be trained on, by their hashes and embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipkit.data.curation.hashes import perceptual_hash
from clipkit.data.engine import Engine


class Pictures(Protocol):
    """A sequence of pictures with names, as evaluation sets hold them; picklable."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str:
        """Returns how a message calls picture `index`."""
        ...

    def load(self, index: int) -> Image.Image:
        """Returns the decoded picture."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """Pictures that must not be trained on.

    names    one per picture; hashes uint64 and `hashed`, which of the pictures have one
    vectors  unit vectors float32 (E, D), None without a model
    """

    names: tuple[str, ...]
    hashes: NDArray[np.uint64]
    hashed: NDArray[np.bool_]
    vectors: NDArray[np.float32] | None = None


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
    names = tuple(pictures.name(index) for pictures in sets for index in range(len(pictures)))
    hashed = np.array([value is not None for value in found], dtype=np.bool_)
    hashes = np.array([value or 0 for value in found], dtype=np.uint64)
    return Evaluation(names, hashes, hashed, None if vectors is None else np.concatenate(vectors))
