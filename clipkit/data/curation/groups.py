"""Which samples are the same: equal digests, and groups of similar 64-bit hashes.

Samples have numbers, counted over all shards in order; of each group the lowest stays.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.data.buckets import BUCKET_BYTES, Buckets

Numbers = NDArray[np.int64]

_PAIRS_AT_ONCE = 1 << 22


def repeated(
    digests: Iterable[tuple[Numbers, NDArray[Any]]],
    num_samples: int,
    folder: Path,
    bucket_bytes: int = BUCKET_BYTES,
) -> Iterator[tuple[Numbers, Numbers]]:
    """Yields (sample numbers, number of the first with the same digest) of all but the first of each group.

    digests: (numbers, 16 bytes each), numbers rising over all parts. What is held at a time is one bucket.
    """
    kind = np.dtype([("high", ">u8"), ("low", ">u8"), ("number", "<i8")])
    with Buckets(folder, kind, num_samples, bucket_bytes) as buckets:
        for numbers, digest in digests:
            records = np.zeros(len(numbers), dtype=kind)
            halves = np.ascontiguousarray(digest).view(">u8").reshape(-1, 2)
            records["high"], records["low"], records["number"] = halves[:, 0], halves[:, 1], numbers
            buckets.add(records["high"].astype(np.uint64), records)
        for records in buckets:
            records = records[np.lexsort((records["number"], records["low"], records["high"]))]
            first = np.ones(len(records), dtype=np.bool_)
            first[1:] = (records["high"][1:] != records["high"][:-1]) | (
                records["low"][1:] != records["low"][:-1]
            )
            starts = np.flatnonzero(first)
            owner = starts[np.cumsum(first) - 1] if len(records) else starts
            later = np.flatnonzero(~first)
            if len(later):
                yield (
                    records["number"][later].astype(np.int64),
                    records["number"][owner[later]].astype(np.int64),
                )


class Components:
    """Connected components of numbers 0..n-1; the label of each is its lowest member."""

    def __init__(self, size: int) -> None:
        self.labels = np.arange(size, dtype=np.int64)

    def join(self, left: Numbers, right: Numbers) -> None:
        """Joins left[i] with right[i]."""
        labels = self.labels
        while len(left):
            a, b = self._roots(left), self._roots(right)
            apart = a != b
            left, right = np.minimum(a, b)[apart], np.maximum(a, b)[apart]
            # The lowest of what a root is joined with; the others come round again.
            np.minimum.at(labels, right, left)

    def _roots(self, numbers: Numbers) -> Numbers:
        labels = self.labels
        roots = labels[numbers]
        while True:
            above = labels[roots]
            if (above == roots).all():
                return roots
            labels[numbers] = above
            roots = above

    def lowest(self) -> Numbers:
        """Returns the lowest member of each number's component, int64 (n,)."""
        labels = self.labels
        while True:
            above = labels[labels]
            if (above == labels).all():
                return labels
            self.labels = labels = above


def similar_pairs(hashes: NDArray[np.uint64], distance: int) -> Iterator[tuple[Numbers, Numbers]]:
    """Yields all pairs of places whose hashes differ in at most `distance` bits, some of them repeatedly.

    Multi-index hashing (Norouzi et al., arXiv:1307.2982): of m pieces of the 64 bits, two such hashes agree
    in at least m - distance; for every choice of that many pieces only hashes equal there are compared.
    """
    for pieces in _choices(len(hashes), distance):
        mask = np.uint64(sum(((1 << (end - start)) - 1) << start for start, end in pieces))
        masked = hashes & mask
        order = np.argsort(masked, kind="stable")
        ordered = masked[order]
        borders = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1], True])
        for left, right in _pairs_within(borders):
            a, b = order[left], order[right]
            near = np.bitwise_count(hashes[a] ^ hashes[b]) <= distance
            if near.any():
                yield a[near], b[near]


def _pairs_within(borders: Numbers) -> Iterator[tuple[Numbers, Numbers]]:
    """Pairs of places within each run borders[i]..borders[i+1], at most a few million at a time."""
    lengths = np.diff(borders)
    starts = borders[:-1][lengths > 1]
    lengths = lengths[lengths > 1]
    # Member j of a run is paired with those after it.
    places = np.repeat(starts, lengths) + _within(lengths)
    later = np.repeat(starts + lengths, lengths) - places - 1
    total = np.cumsum(later)
    at = 0
    while at < len(places):
        done = int(total[at - 1]) if at else 0
        stop = max(at + 1, int(np.searchsorted(total, done + _PAIRS_AT_ONCE, side="right")))
        count = later[at:stop]
        left = np.repeat(places[at:stop], count)
        yield left, left + 1 + _within(count)
        at = stop


def _within(lengths: Numbers) -> Numbers:
    """0..l-1 for each length l, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def _choices(num_hashes: int, distance: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """The sets of pieces to agree in, with as many pieces as make sorting and comparing cheapest."""

    def cost(pieces: int) -> float:
        agreeing = pieces - distance
        pairs = num_hashes**2 / 2 / 2 ** (64 * agreeing / pieces)
        return math.comb(pieces, agreeing) * (20 * num_hashes + pairs)

    pieces = min(range(distance + 1, min(64, distance + 6) + 1), key=cost)
    cuts = [64 * number // pieces for number in range(pieces + 1)]
    spans = list(itertools.pairwise(cuts))
    return itertools.combinations(spans, pieces - distance)


def similar_to(
    hashes: NDArray[np.uint64], others: NDArray[np.uint64], distance: int
) -> tuple[Numbers, Numbers]:
    """Returns the distinct pairs (place in `hashes`, in `others`) that differ in at most `distance` bits.

    As `similar_pairs`: only hashes that agree in enough pieces are compared.
    """
    found = [np.zeros((0, 2), dtype=np.int64)]
    for pieces in _choices(len(others), distance):
        mask = np.uint64(sum(((1 << (end - start)) - 1) << start for start, end in pieces))
        order = np.argsort(others & mask, kind="stable")
        ordered, wanted = (others & mask)[order], hashes & mask
        low, high = (np.searchsorted(ordered, wanted, side) for side in ("left", "right"))
        total = np.cumsum(high - low)
        at = 0
        while at < len(hashes):
            done = int(total[at - 1]) if at else 0
            stop = max(at + 1, int(np.searchsorted(total, done + _PAIRS_AT_ONCE, side="right")))
            count = (high - low)[at:stop]
            mine = np.repeat(np.arange(at, stop), count)
            theirs = order[np.repeat(low[at:stop], count) + _within(count)]
            near = np.bitwise_count(hashes[mine] ^ others[theirs]) <= distance
            found.append(np.stack([mine[near], theirs[near]], axis=1))
            at = stop
    pairs = np.unique(np.concatenate(found), axis=0)
    return pairs[:, 0], pairs[:, 1]
