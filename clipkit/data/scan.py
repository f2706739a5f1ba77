"""The scan of one shard: where its samples start, and everything that would merge, tear or lose samples."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipkit.data.options import DEFAULT_STORAGE, Storage
from clipkit.data.remote import RemoteShards
from clipkit.data.source import is_remote
from clipkit.data.tar_format import BLOCK, IMAGE_EXTENSIONS, Member, Read, split_name, walk
from clipkit.types import DataError

REMOTE_BLOCK = 8 << 20  # bytes per request of a walk: few requests, and large members are still skipped


class ShardScan(NamedTuple):
    """What the walk over one shard found. `starts`: the byte where each sample starts, and the end.

    stamp   modification time in ns; of a remote shard 63 bits of its ETag or time, 0 if it tells neither
    """

    size: int
    stamp: int
    digest: str
    starts: NDArray[np.int64]
    ignored: int


def scan_shard(path: str, storage: Storage = DEFAULT_STORAGE) -> ShardScan:
    """Walks one shard strictly and returns what it found. Raises DataError on any damage.

    Samples must be complete runs of members with one key, keys unique within the shard. A remote shard is
    read in blocks of 8 MiB.
    """
    if is_remote(path):
        source = RemoteShards(storage)
        try:
            facts = source.facts(path)
            blocks = _Blocks(lambda begin, end: source.read(path, begin, end, facts), facts[0])
            return _scan(path, blocks.read, *facts)
        finally:
            source.close()
    with open(path, "rb") as file:
        descriptor = file.fileno()
        status = os.fstat(descriptor)
        return _scan(
            path,
            lambda offset, size: os.pread(descriptor, size, offset),
            status.st_size,
            status.st_mtime_ns,
        )


def _scan(path: str, read: Read, size: int, stamp: int) -> ShardScan:
    if size == 0:
        raise DataError(f"{path}: empty file (0 bytes)", "write or download the shard again")
    digest = hashlib.blake2b(digest_size=8)
    grouper = _Grouper(path)
    for member in walk(read, 0, size, path, whole=True, on_header=digest.update):
        grouper.add(member)
    grouper.close()
    starts = np.array([*grouper.starts, grouper.end], dtype=np.int64)
    return ShardScan(size, stamp, digest.hexdigest(), starts, grouper.ignored)


class _Blocks:
    """Small reads in rising order, served from one large read at a time."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read = read
        self._size = size
        self._begin = 0
        self._block = b""

    def read(self, offset: int, size: int) -> bytes:
        """Returns up to `size` bytes at `offset`, fewer at the end of the file."""
        end = min(offset + size, self._size)
        if not self._begin <= offset <= end <= self._begin + len(self._block):
            self._begin = offset
            self._block = self._read(offset, max(end, min(offset + REMOTE_BLOCK, self._size)))
        return self._block[offset - self._begin : end - self._begin]


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
