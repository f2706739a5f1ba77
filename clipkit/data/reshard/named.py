"""Which keys of a list or table are those of samples: a list of wrong keys should not pass in silence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from clipkit.data.tar_index import replacing

_BLOCK = 1 << 17  # bytes of the bitmap that are looked through at a time
_SHOWN = 3


class Keyed(Protocol):
    """What is searched by key, and numbers what it finds."""

    def __len__(self) -> int: ...
    def first_keys(self, rows: NDArray[np.int64], most: int) -> list[tuple[int, str]]:
        """Returns place and text of the keys of these rows, the first `most`."""
        ...


def found_path(folder: Path, kind: str, number: int) -> Path:
    """Returns where the rows that the samples of one input shard name are kept while the job runs."""
    return folder / f"found-{kind}-{number:06d}"


def write_found(path: Path, rows: NDArray[np.int64]) -> None:
    """Writes the rows that samples name, each of them once."""
    with replacing(path) as out:
        out.write(np.unique(rows).astype("<i8").tobytes())


def without_sample(keys: Keyed, paths: Iterator[Path]) -> tuple[int, tuple[str, ...]]:
    """Returns how many rows of `keys` no shard found, by the files of `write_found`, and the first keys.

    Takes one bit of memory per row.
    """
    found = np.zeros(-(-len(keys) // 8), np.uint8)
    for path in paths:
        rows = np.fromfile(path, "<i8")
        np.bitwise_or.at(found, rows >> 3, np.left_shift(1, rows & 7).astype(np.uint8))
    missing = 0
    first: list[tuple[int, str]] = []
    for begin in range(0, len(found), _BLOCK):
        bits = np.unpackbits(found[begin : begin + _BLOCK], bitorder="little")
        rows = np.flatnonzero(bits[: len(keys) - 8 * begin] == 0) + 8 * begin
        missing += len(rows)
        first = sorted([*first, *keys.first_keys(rows, _SHOWN)])[:_SHOWN]
    return missing, tuple(key for _, key in first)
