"""How often things occur, by 64-bit hashes: exact up to a limit of memory, a sample of them beyond it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
MAX_HASHES = 1 << 24  # 128 MB, and as much again while they are sorted


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
    """Hashes from many groups (shards), at most `limit` of them in memory.

    Beyond it only hashes that end in `level` zero bits stay, a random share of what is counted: all copies of
    one thing stay or go together, so shares of duplicates remain right, and one in 2 ** level is seen.
    Neither depends on the order in which groups are added.
    """

    def __init__(self, limit: int = MAX_HASHES, groups: bool = False) -> None:
        self.level = 0
        self.seen = 0
        self._limit = limit
        self._keep_groups = groups
        self._held = 0
        self._hashes: list[Hashes] = []
        self._groups: list[NDArray[np.int32]] = []

    def add(self, hashes: Hashes, group: int = 0) -> None:
        """Counts the hashes of one more group."""
        self.seen += len(hashes)
        kept = self._thinned(hashes)
        self._hashes.append(kept)
        if self._keep_groups:
            self._groups.append(np.full(len(kept), group, dtype=np.int32))
        self._held += len(kept)
        while self._held > self._limit:
            self.level += 1
            self._thin()

    def _thinned(self, hashes: Hashes) -> Hashes:
        return hashes[hashes & self._mask == 0] if self.level else hashes

    @property
    def _mask(self) -> np.uint64:
        return np.uint64((1 << self.level) - 1)

    def _thin(self) -> None:
        all_hashes = self._all()
        stays = all_hashes & self._mask == 0
        if self._keep_groups:
            self._groups = [np.concatenate(self._groups)[stays]]
        self._hashes = [all_hashes[stays]]
        self._held = len(self._hashes[0])

    def _all(self) -> Hashes:
        return np.concatenate(self._hashes) if self._hashes else np.zeros(0, dtype=np.uint64)

    def repeated(self) -> tuple[int, int]:
        """Returns (copies beyond the first, all that were looked at), of the share that is in memory."""
        found = self._all()
        return len(found) - len(np.unique(found)), len(found)

    def times(self, wanted: Hashes) -> NDArray[np.int64]:
        """Returns how often each of these hashes was seen, (n,); 0 for those outside the share in memory."""
        found = np.sort(self._all())
        first, last = (np.searchsorted(found, wanted, side=side) for side in ("left", "right"))
        return (last - first).astype(np.int64)

    def in_several_groups(self) -> list[tuple[int, list[int]]]:
        """Returns (hash, its groups in order) of the hashes that several groups share."""
        hashes, groups = self._all(), np.concatenate(self._groups or [np.zeros(0, dtype=np.int32)])
        order = np.lexsort((groups, hashes))
        hashes, groups = hashes[order], groups[order]
        again = np.flatnonzero((hashes[1:] == hashes[:-1]) & (groups[1:] != groups[:-1]))
        found: dict[int, list[int]] = {}
        for at in again.tolist():
            into = found.setdefault(int(hashes[at]), [int(groups[at])])
            into.append(int(groups[at + 1]))
        return list(found.items())
