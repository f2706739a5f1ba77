"""How often things occur, by 64-bit hashes: exact up to a limit of memory, a sample of them beyond it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
MAX_HASHES = 1 << 23  # 210 MB, and as much again while they are sorted
_COUNTED = np.dtype([("hash", "<u8"), ("group", "<i4"), ("times", "<i8")])


def hashes_of(contents: Iterable[bytes]) -> Hashes:
    """Returns the hashes of these contents, (n,)."""
    digests = b"".join(hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def to_text(hashes: Hashes) -> str:
    """Returns the hashes as text for a JSON file."""
    return base64.b64encode(hashes.astype("<u8").tobytes()).decode()


def of_text(text: str) -> Hashes:
    """Returns the hashes of `to_text`."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<u8").astype(np.uint64)


class HashCounts:
    """Hashes from many groups (shards), at most `limit` different ones in memory.

    Beyond it only hashes that end in `level` zero bits stay, a random share of what is counted: all copies of
    one thing stay or go together, so shares of duplicates remain right, and one in 2 ** level is seen.
    Neither depends on the order in which groups are added. groups: in which of them each hash stands is kept.
    """

    def __init__(self, limit: int = MAX_HASHES, groups: bool = False) -> None:
        self.seen = 0
        self._level = 0
        self._at_rest = False  # whether the one part is what `_settled` returns
        self._limit = limit
        self._keep_groups = groups
        self._held = 0
        self._parts: list[NDArray[Any]] = []

    def add(self, hashes: Hashes, group: int = 0) -> None:
        """Counts the hashes of one more group."""
        self.seen += len(hashes)
        values, times = np.unique(hashes[hashes & self._mask == 0], return_counts=True)
        part = np.zeros(len(values), _COUNTED)
        part["hash"], part["group"], part["times"] = values, group if self._keep_groups else 0, times
        self._parts.append(part)
        self._at_rest = False
        self._held += len(part)
        # Not at the limit itself: sorting all for every group would take for ever.
        if self._held > self._limit + self._limit // 4:
            self._settled()

    @property
    def level(self) -> int:
        """How many zero bits the hashes in memory end in."""
        self._settled()
        return self._level

    @property
    def _mask(self) -> np.uint64:
        return np.uint64((1 << self._level) - 1)

    def _settled(self) -> NDArray[Any]:
        """Every hash once (in each group), ascending, with how often it was seen there; at most the limit."""
        if self._at_rest:
            return self._parts[0]
        found = np.concatenate(self._parts or [np.zeros(0, _COUNTED)])
        found = found[np.lexsort((found["group"], found["hash"]))]
        first = np.ones(len(found), dtype=np.bool_)
        first[1:] = (found["hash"][1:] != found["hash"][:-1]) | (found["group"][1:] != found["group"][:-1])
        starts = np.flatnonzero(first)
        distinct = found[starts]
        if len(starts):
            distinct["times"] = np.add.reduceat(found["times"], starts)
        while len(distinct) > self._limit:
            self._level += 1
            distinct = distinct[distinct["hash"] & self._mask == 0]
        self._parts, self._held, self._at_rest = [distinct], len(distinct), True
        return distinct

    def repeated(self) -> tuple[int, int]:
        """Returns (copies beyond the first, all that were looked at), of the share that is in memory."""
        found = self._settled()
        total = int(found["times"].sum())
        return total - len(np.unique(found["hash"])), total

    def times(self, wanted: Hashes) -> NDArray[np.int64]:
        """Returns how often each of these hashes was seen, (n,); 0 for those outside the share in memory."""
        found = self._settled()
        before = np.concatenate([[0], np.cumsum(found["times"])])
        first, last = (np.searchsorted(found["hash"], wanted, side=side) for side in ("left", "right"))
        return (before[last] - before[first]).astype(np.int64)

    def in_several_groups(self, limit: int) -> tuple[int, list[tuple[int, list[int]]]]:
        """Returns how many hashes several groups share, and (hash, its groups) of `limit` of them."""
        found = self._settled()
        hashes = found["hash"]
        shared = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        first, last = (np.searchsorted(hashes, shared[:limit], side=side) for side in ("left", "right"))
        spans = zip(shared[:limit].tolist(), first.tolist(), last.tolist(), strict=True)
        return len(shared), [(key, found["group"][a:b].tolist()) for key, a, b in spans]
