"""The scan of one shard: where its samples start, and everything that would merge, tear or lose samples."""

from __future__ import annotations

import hashlib
import os
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipkit.data.tar_format import BLOCK, IMAGE_EXTENSIONS, Member, split_name, walk
from clipkit.types import DataError


class ShardScan(NamedTuple):
    """What the walk over one shard found. `starts`: the byte where each sample starts, and the end."""

    size: int
    mtime_ns: int
    digest: str
    starts: NDArray[np.int64]
    ignored: int


def scan_shard(path: str) -> ShardScan:
    """Walks one shard strictly and returns what it found. Raises DataError on any damage.

    Samples must be complete runs of members with one key, keys unique within the shard.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if status.st_size == 0:
            raise DataError(f"{path}: empty file (0 bytes)", "write or download the shard again")
        descriptor = file.fileno()
        digest = hashlib.blake2b(digest_size=8)
        grouper = _Grouper(path)
        members = walk(
            lambda offset, size: os.pread(descriptor, size, offset),
            0,
            status.st_size,
            path,
            whole=True,
            on_header=digest.update,
        )
        for member in members:
            grouper.add(member)
        grouper.close()
    starts = np.array([*grouper.starts, grouper.end], dtype=np.int64)
    return ShardScan(status.st_size, status.st_mtime_ns, digest.hexdigest(), starts, grouper.ignored)


class _Grouper:
    """Groups members into samples and refuses what would merge or tear samples."""

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self.starts: list[int] = []
        self.end = 0
        self.ignored = 0
        self._keys: dict[str, str] = {}
        self._key: str | None = None
        self._members: dict[str, str] = {}

    def add(self, member: Member) -> None:
        parts = split_name(member.name)
        if parts is None:
            self.ignored += 1
            return
        key, extension = parts
        if key != self._key:
            if key in self._keys:
                raise DataError(
                    f"{self.shard}: members {self._keys[key]!r} and {member.name!r} (byte {member.start}) "
                    f"share the key {key!r} but do not stand together: used twice, or interleaved",
                    "write the shard again with one run of members per unique key",
                )
            self.close()
            self._key, self._members = key, {}
            self._keys[key] = member.name
            self.starts.append(member.start)
        if extension in self._members:
            raise DataError(
                f"{self.shard}: member {member.name!r} (byte {member.start}) repeats "
                f"{self._members[extension]!r}",
                "write the shard again with one member per key and extension",
            )
        self._members[extension] = member.name
        self.end = member.data + -(-member.size // BLOCK) * BLOCK

    def close(self) -> None:
        """Looks for samples that fell into one because their names hold dots: the key ends at the first."""
        if self._members.keys() & set(IMAGE_EXTENSIONS):
            return
        seen: dict[str, str] = {}
        for extension, name in self._members.items():
            kind = extension.rpartition(".")[2]
            if kind in IMAGE_EXTENSIONS and kind in seen:
                raise DataError(
                    f"{self.shard}: members {seen[kind]!r} and {name!r} fall into one sample {self._key!r}, "
                    "because a key ends at the first dot of the name",
                    "write the shard again with keys without dots",
                )
            seen[kind] = name
