"""The scan of one shard: where its samples start, and everything that would merge, tear or lose samples."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipkit.data.options import DEFAULT_STORAGE, Storage
from clipkit.data.remote import RemoteShards
from clipkit.data.source import is_remote
from clipkit.data.tar_format import BLOCK, IMAGE_EXTENSIONS, Member, Read, ShardDamage, split_name, walk
from clipkit.types import DataError

KEY_TWICE, MEMBER_TWICE, DOTTED = "key used twice", "member twice", "dots in names"
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

    Samples must be complete runs of members with one key, keys unique within the shard.
    """
    with opened_walk(path, storage) as walked:
        for _ in walked.samples():
            pass
        return walked.result()


class OpenShard(NamedTuple):
    """A shard while it is read: `read(offset, size)`, bytes in all, and its stamp."""

    read: Read
    size: int
    stamp: int


@contextmanager
def opened_shard(path: str, storage: Storage = DEFAULT_STORAGE) -> Iterator[OpenShard]:
    """The shard, open while the block runs; a remote one is read in blocks of 8 MiB.

    Raises OSError or DataError when it is out of reach.
    """
    if is_remote(path):
        source = RemoteShards(storage)
        try:
            facts = source.facts(path)
            blocks = Blocks(lambda begin, end: source.read(path, begin, end, facts), facts[0])
            yield OpenShard(blocks.read, *facts)
        finally:
            source.close()
        return
    # Without waiting: a pipe that nobody writes to would be waited for for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: not a file", "give the shards themselves")
        yield OpenShard(
            lambda offset, size: os.pread(descriptor, size, offset), status.st_size, status.st_mtime_ns
        )
    finally:
        os.close(descriptor)


@contextmanager
def opened_walk(path: str, storage: Storage = DEFAULT_STORAGE) -> Iterator[ShardWalk]:
    """The walk over one shard, open while the block runs."""
    with opened_shard(path, storage) as opened:
        yield ShardWalk(path, *opened)


class SampleSpan(NamedTuple):
    """Where one sample lies: bytes start..end of its shard, and its members by extension."""

    key: str
    start: int
    end: int
    members: dict[str, Member]


class ShardWalk:
    """The strict walk over one shard, sample by sample; damage raises DataError when it is reached."""

    def __init__(self, path: str, read: Read, size: int, stamp: int) -> None:
        if size == 0:
            raise DataError(f"{path}: empty file (0 bytes)", "write or download the shard again")
        self._path, self._read, self._size, self._stamp = path, read, size, stamp
        self._digest = hashlib.blake2b(digest_size=8)
        self._grouper = Grouper(path)

    @property
    def digest(self) -> str:
        """The hash of all headers that were passed."""
        return self._digest.hexdigest()

    def samples(self) -> Iterator[SampleSpan]:
        """Yields the samples in order, each when the header after it was read."""
        for member in walk(self._read, 0, self._size, self._path, whole=True, on_header=self._digest.update):
            done = self._grouper.add(member)
            if done is not None:
                yield done
        done = self._grouper.close()
        if done is not None:
            yield done

    def result(self) -> ShardScan:
        """Returns the scan, once all samples were passed."""
        grouper = self._grouper
        starts = np.array([*grouper.starts, grouper.end], dtype=np.int64)
        return ShardScan(self._size, self._stamp, self.digest, starts, grouper.ignored)


class Blocks:
    """Small reads in rising order, served from large ones.

    keep    what is read stays, from `release` on, without holes; otherwise what nobody asks for is not read
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int, block: int = REMOTE_BLOCK) -> None:
        self.keep = False
        self._read = read
        self._size = size
        self._block = block
        self._begin = self._needed = 0
        self._held = b""

    def read(self, offset: int, size: int) -> bytes:
        """Returns up to `size` bytes at `offset`, fewer at the end of the file."""
        stop = min(offset + size, self._size)
        end = self._begin + len(self._held)
        if not self._begin <= offset <= stop <= end:
            if self.keep and self._held and self._begin <= offset:
                dropped = max(0, min(self._needed, end) - self._begin)
                more = self._read(end, max(stop, min(end + self._block, self._size)))
                self._held = self._held[dropped:] + more
                self._begin += dropped
            else:
                self._begin = offset
                self._held = self._read(offset, max(stop, min(offset + self._block, self._size)))
        return self._held[offset - self._begin : stop - self._begin]

    def release(self, before: int) -> None:
        """Allows the bytes before `before` to be dropped."""
        self._needed = before


def _raise(damage: ShardDamage) -> None:
    raise damage


class Grouper:
    """Groups members into samples and refuses what would merge or tear samples.

    on_damage    is told of what is refused; when it returns, the first of two members with one name stays,
                 and a key that is met again begins another sample
    """

    def __init__(self, shard: str, on_damage: Callable[[ShardDamage], None] = _raise) -> None:
        self.shard = shard
        self.starts: list[int] = []
        self.end = 0
        self.ignored = 0
        self._on_damage = on_damage
        self._keys: dict[str, str] = {}
        self._key: str | None = None
        self._members: dict[str, Member] = {}

    def add(self, member: Member) -> SampleSpan | None:
        """Takes the next member; returns the sample before it, if that ended."""
        parts = split_name(member.name)
        if parts is None:
            self.ignored += 1
            return None
        done = None
        key, extension = parts
        if key != self._key:
            if key in self._keys:
                self._refuse(
                    member,
                    f"members {self._keys[key]!r} and {member.name!r} (byte {member.start}) "
                    f"share the key {key!r} but do not stand together: used twice, or interleaved",
                    KEY_TWICE,
                    "write the shard again with one run of members per unique key",
                )
            done = self.close()
            self._key, self._members = key, {}
            self._keys[key] = member.name
            self.starts.append(member.start)
        self.end = member.data + -(-member.size // BLOCK) * BLOCK
        if extension in self._members:
            self._refuse(
                member,
                f"member {member.name!r} (byte {member.start}) repeats {self._members[extension].name!r}",
                MEMBER_TWICE,
                "write the shard again with one member per key and extension",
            )
            return done
        self._members[extension] = member
        return done

    def close(self) -> SampleSpan | None:
        """Returns the sample that ended, if there is one.

        Refuses samples that fell into one because their names hold dots: the key ends at the first.
        """
        if self._key is None:
            return None
        if not self._members.keys() & set(IMAGE_EXTENSIONS):
            self._refuse_dots()
        return SampleSpan(self._key, self.starts[-1], self.end, self._members)

    def _refuse_dots(self) -> None:
        seen: dict[str, str] = {}
        for extension, member in self._members.items():
            kind = extension.rpartition(".")[2]
            if kind in IMAGE_EXTENSIONS and kind in seen:
                self._refuse(
                    member,
                    f"members {seen[kind]!r} and {member.name!r} fall into one sample "
                    f"{self._key!r}, because a key ends at the first dot of the name",
                    DOTTED,
                    "write the shard again with keys without dots",
                )
            seen[kind] = member.name

    def _refuse(self, member: Member, problem: str, kind: str, cure: str) -> None:
        cause = f"{self.shard}: {problem}"
        self._on_damage(ShardDamage(cause, cure, problem, kind, member.start, member.name))
