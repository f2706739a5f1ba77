"""What a job knows about every sample: one array of rows per shard, made once and kept in files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.data.engine import Engine
from clipkit.data.finished import Ended, Finished

Rows = NDArray[Any]
OnPart = Callable[[str, int, int], None]
"""Called with (stage, parts done, parts in all)."""


@dataclass(frozen=True)
class Survey:
    """Rows about every sample of `shards`, by kind, below the records of a job.

    A kind is a structured array per shard, row i about its sample i, and further arrays by name. Those
    already made are read: a job that was interrupted continues, and several machines can make a part each.

    ended: what is there already of a job that has ended, which then is all there is to say.
    """

    shards: tuple[str, ...]
    work: Finished
    ended: Ended | None = None

    def make(
        self,
        kind: str,
        function: Callable[..., Mapping[str, Rows]],
        numbers: range,
        engine: Engine,
        progress: OnPart | None = None,
        arguments: tuple[Any, ...] = (),
    ) -> None:
        """Makes the arrays function(shard, *arguments) of these shards, where they are not made yet.

        The array `samples` holds the rows.
        """
        pending = [number for number in numbers if self.work.get(f"{kind}-{number:05d}") is None]
        parts = ((self.shards[number], *arguments) for number in pending)
        for done, (number, arrays) in enumerate(
            zip(pending, engine.map(function, parts), strict=True), len(numbers) - len(pending) + 1
        ):
            self.store(kind, number, arrays)
            if progress is not None:
                progress(kind, done, len(numbers))

    def store(self, kind: str, number: int, arrays: Mapping[str, Rows]) -> None:
        """Keeps the arrays of one shard."""
        for name, array in arrays.items():
            final = self._path(kind, number, name)
            temporary = final.with_suffix(".tmp")
            with temporary.open("wb") as out:
                np.save(out, array, allow_pickle=False)
            os.replace(temporary, final)
        self.work.put(f"{kind}-{number:05d}", {"rows": len(arrays["samples"])})

    def rows(self, kind: str, number: int, name: str = "samples") -> Rows:
        """Returns the rows of one shard, or the further array `name`, mapped from their file."""
        path = self._path(kind, number, name)
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError:
            # An array without entries cannot be mapped.
            return np.load(path, allow_pickle=False)

    def counts(self, kind: str) -> NDArray[np.int64]:
        """Returns the number of samples of every shard, int64 (S,)."""
        return np.array([len(self.rows(kind, n)) for n in range(len(self.shards))], dtype=np.int64)

    def _path(self, kind: str, number: int, name: str) -> Path:
        return self.work.place(f"{kind}-{number:05d}-{name}.npy")


def rows_of(keys: Sequence[str], **columns: Any) -> Rows:
    """Returns a structured array of `columns`, each (n, ...), and the sample keys as column `key`."""
    encoded = np.array([key.encode("utf-8", "surrogateescape") for key in keys], dtype=np.bytes_)
    arrays = {"key": encoded if len(keys) else np.zeros(0, "S1"), **columns}
    kinds = [(name, array.dtype, array.shape[1:]) for name, array in arrays.items()]
    rows = np.zeros(len(keys), dtype=np.dtype(kinds))
    for name, array in arrays.items():
        rows[name] = array
    return rows


def key_of(stored: bytes) -> str:
    """Returns the sample key that was stored in a row."""
    return stored.decode("utf-8", "surrogateescape")
