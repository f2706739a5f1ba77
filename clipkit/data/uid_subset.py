"""Subsets as DataComp publishes them: a sorted .npy of 128-bit uids in two 64-bit halves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.types import DataError

UID_DTYPE = np.dtype("u8,u8")
_UID = re.compile(r"[0-9a-fA-F]{32}")
_BLOCK = 1 << 20
_SORT = 'sort it: python -c "import numpy, sys; numpy.save(sys.argv[2], numpy.sort(numpy.load(sys.argv[1])))"'

Halves = NDArray[np.uint64]


class UidSubset:
    """The uids of a file, mapped as they are. An entry that stands n times asks for n copies of its sample.

    Source: DataComp (github.com/mlfoundations/datacomp), resharder.py. Raises DataError for another dtype or
    shape. Searches need a sorted file: `check_sorted` reads all of it, once per job.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            entries = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{path}: cannot be read as .npy ({error})", "write it with numpy.save"
            ) from error
        if entries.dtype != UID_DTYPE or entries.ndim != 1:
            raise DataError(
                f"{path}: dtype {entries.dtype} and shape {entries.shape} instead of (n,) pairs u8,u8",
                "store (int(uid[:16], 16), int(uid[16:], 16)) per uid",
            )
        if not len(entries):
            raise DataError(f"{path}: no uids", "give a file with one entry per sample")
        self._halves: Halves = entries.view(np.uint64).reshape(-1, 2)
        self._offset = int(entries.offset)

    def __len__(self) -> int:
        return len(self._halves)

    def locate(self, uids: Sequence[str | None]) -> NDArray[np.int64]:
        """Returns (first, end) of the entries of each uid, (len(uids), 2); equal for an absent one."""
        found = np.zeros((len(uids), 2), dtype=np.int64)
        halves = [uid_halves(uid) for uid in uids]
        valid = [at for at, each in enumerate(halves) if each is not None]
        wanted = np.array([halves[at] for at in valid], dtype=np.uint64).reshape(-1, 2)
        found[valid, 0] = self._search(wanted, after_equal=False)
        found[valid, 1] = self._search(wanted, after_equal=True)
        return found

    def first_keys(self, entries: NDArray[np.int64], most: int) -> list[tuple[int, str]]:
        """Returns place and text of the first `most` of these entries."""
        return [(at, "{:016x}{:016x}".format(*self._halves[at].tolist())) for at in entries[:most].tolist()]

    def _search(self, wanted: Halves, after_equal: bool) -> NDArray[np.int64]:
        # numpy.searchsorted would copy the whole file for every shard: its halves are not contiguous.
        low = np.zeros(len(wanted), dtype=np.int64)
        high = np.full(len(wanted), len(self._halves), dtype=np.int64)
        while np.any(low < high):
            middle = np.minimum((low + high) // 2, len(self._halves) - 1)
            entry = self._halves[middle]
            before = entry[:, 1] < wanted[:, 1]
            if after_equal:
                before |= entry[:, 1] == wanted[:, 1]
            before = (entry[:, 0] < wanted[:, 0]) | ((entry[:, 0] == wanted[:, 0]) & before)
            active = low < high
            low = np.where(active & before, middle + 1, low)
            high = np.where(active & ~before, middle, high)
        return low

    def check_sorted(self) -> None:
        """Raises DataError for a file that is not sorted: searches would miss entries without a word."""
        # Read, not through the mapping: that would count as memory of this process.
        with self.path.open("rb") as file:
            for begin in range(0, len(self._halves) - 1, _BLOCK):
                file.seek(self._offset + begin * UID_DTYPE.itemsize)
                part = np.fromfile(file, np.uint64, 2 * (_BLOCK + 1)).reshape(-1, 2)
                first, second = part[:-1], part[1:]
                wrong = (first[:, 0] > second[:, 0]) | (
                    (first[:, 0] == second[:, 0]) & (first[:, 1] > second[:, 1])
                )
                if wrong.any():
                    at = begin + int(np.argmax(wrong)) + 1
                    raise DataError(
                        f"{self.path}: not sorted (entry {at} is smaller than the one before)", _SORT
                    )


def uid_halves(text: Any) -> tuple[int, int] | None:
    """Returns the two 64-bit halves of a DataComp uid; None for what is not 32 hexadecimal digits."""
    if not isinstance(text, str) or not _UID.fullmatch(text):
        return None
    return int(text[:16], 16), int(text[16:], 16)
