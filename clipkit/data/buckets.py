"""Sorting what does not fit into memory: records in files by their leading bits, one file at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BUCKET_BYTES = 256 << 20


class Buckets:
    """Records (8 leading bytes to sort by, payload) kept in files by their leading bits, so that one file
    at a time fits into memory. The files end with the context.
    """

    def __init__(self, folder: Path, dtype: Any, num_records: int, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.dtype = np.dtype(dtype)
        size = max(1, num_records * self.dtype.itemsize)
        self.bits = max(0, math.ceil(math.log2(size / bucket_bytes)))
        self._paths = [folder / f"bucket-{number:05d}" for number in range(1 << self.bits)]

    def __enter__(self) -> Buckets:
        for path in self._paths:
            path.write_bytes(b"")
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._paths:
            path.unlink(missing_ok=True)

    def add(self, leading: NDArray[np.uint64], records: NDArray[Any]) -> None:
        """Appends records; `leading` are the 64 bits whose first ones name the bucket."""
        if not self.bits:
            with self._paths[0].open("ab") as out:
                out.write(records.tobytes())
            return
        numbers = (leading >> np.uint64(64 - self.bits)).astype(np.int64)
        order = np.argsort(numbers, kind="stable")
        borders = np.searchsorted(numbers[order], np.arange(len(self._paths) + 1))
        for number in np.unique(numbers).tolist():
            with self._paths[number].open("ab") as out:
                out.write(records[order[borders[number] : borders[number + 1]]].tobytes())

    def __iter__(self) -> Iterator[NDArray[Any]]:
        for path in self._paths:
            yield np.fromfile(path, dtype=self.dtype)
