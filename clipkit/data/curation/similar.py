"""Near duplicates by embeddings: vectors whose cosine reaches a bound."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.data.curation.groups import Components, Numbers
from clipkit.types import ConfigError, DataError

Vectors = Callable[[], Iterable[tuple[Numbers, NDArray[np.float32]]]]

_EXACT_BELOW = 20_000  # vectors; comparing all of them takes seconds, and misses none
_BLOCK = 1 << 24  # entries of a table of cosines


def usearch_index() -> Any:
    """Returns the module usearch.index; ConfigError when it is not installed."""
    try:
        return importlib.import_module("usearch.index")
    except ImportError as error:
        raise ConfigError("embeddings need the package usearch", "install clipkit[data]") from error


def join_similar(components: Components, vectors: Vectors, cosine: float, neighbours: int) -> None:
    """Joins the numbers of vectors whose cosine is at least `cosine`.

    Of every vector the `neighbours` nearest are looked at: exactly up to 20,000 vectors, beyond that by a
    graph (HNSW, arXiv:1603.09320), which may miss some. One thread: the graph depends on the order.
    """
    total = sum(len(numbers) for numbers, _ in vectors())
    if not total:
        return
    index: Any = None
    for numbers, rows in vectors():
        if not len(numbers):
            continue
        if index is None:
            index = usearch_index().Index(ndim=rows.shape[1], metric="cos", dtype="f32")
        index.add(numbers.astype(np.uint64), rows, threads=1)
    count = min(neighbours + 1, total)
    for numbers, rows in vectors():
        if not len(numbers):
            continue
        found = index.search(rows, count, exact=total <= _EXACT_BELOW, threads=1)
        keys = np.asarray(found.keys).reshape(len(rows), -1).astype(np.int64)
        near = 1.0 - np.asarray(found.distances).reshape(len(rows), -1) >= cosine
        mine = np.repeat(numbers, near.sum(axis=1))
        components.join(mine, keys[near])


def similar_rows(
    rows: NDArray[np.float32], others: NDArray[np.float32], cosine: float
) -> tuple[Numbers, Numbers, NDArray[np.float32]]:
    """Returns all pairs (row, other) of unit vectors whose cosine is at least `cosine`, and their cosines."""
    mine, theirs, values = [], [], []
    step = max(1, _BLOCK // max(1, len(others)))
    for start in range(0, len(rows), step):
        table = rows[start : start + step] @ others.T
        row, other = np.nonzero(table >= cosine)
        mine.append(row + start)
        theirs.append(other)
        values.append(table[row, other])
    if not mine:
        none = np.zeros(0, dtype=np.int64)
        return none, none, np.zeros(0, dtype=np.float32)
    return np.concatenate(mine), np.concatenate(theirs), np.concatenate(values)


def open_vectors(path: Path, num_samples: int) -> NDArray[Any]:
    """Returns the rows of a .npy file, mapped; one row per sample in order. Raises ConfigError, DataError."""
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror or error}", "give a .npy file, or a MODEL, to --embeddings"
        ) from error
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: not an array ({error})", "save it with numpy.save") from error
    if vectors.ndim != 2 or vectors.dtype.kind != "f" or len(vectors) != num_samples:
        raise DataError(
            f"{path}: {vectors.dtype} of shape {vectors.shape}, the shards hold {num_samples} samples",
            "give one row of floating-point numbers per sample, in the order of the shards",
        )
    return vectors


def unit_rows(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Returns the rows with length 1, float32; zero and non-finite rows become NaN."""
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    lengths[(lengths == 0) | ~np.isfinite(lengths)] = np.nan
    return (rows / lengths).astype(np.float32)
