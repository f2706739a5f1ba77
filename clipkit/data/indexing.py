"""From a list of shards to their index: what is known already is read, the rest is walked and kept.

Every finished shard leaves a record of its own, so that a killed walk continues after it and machines can
share the shards of one set. A set that grew is walked where it grew.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from clipkit.data.engine import Engine
from clipkit.data.fingerprints import Fingerprint, fingerprints
from clipkit.data.options import DEFAULT_STORAGE, Storage
from clipkit.data.scan import REMOTE_BLOCK, ShardScan, scan_shard
from clipkit.data.source import is_remote
from clipkit.data.tar_format import BLOCK
from clipkit.data.tar_index import (
    SPARSE_STRIDE,
    Index,
    load_index,
    replacing,
    save_index,
    saved_indices,
)
from clipkit.types import DataError

DENSE_SAMPLES = 1 << 20
RECORDS = ".clipkit-shards"
OnShard = Callable[[int, int], None]

_RECORD_VERSION = 1
_RECORD_ERRORS = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error),
    *(RecursionError, MemoryError),  # what a header claims, not what there is
)
# Parts of signed addresses that change from day to day; the bytes behind them do not.
_PASSING = re.compile(
    r"(?i)^(sig|signature|token|.*[-_]token|credential|expires|policy|key-pair-id|awsaccesskeyid|googleaccessid|"
    r"x-amz-.*|x-goog-.*|s[eptvkr]|sk[a-z]+)="
)


class Forecast(NamedTuple):
    """What a walk will read: shards, bytes of all of them, and requests to remote storage (at most)."""

    shards: int
    bytes: int
    requests: int


class Indexing:
    """The indexing of a list of shards.

    The index and the records lie in `cache_dir`, by default beside the first shard, or in the user's cache
    folder when that cannot be written or is remote. `refresh` ignores what is there. Once a whole index lies
    beside the shards, their records are removed; those in a cache folder stay, because who else needs them
    there is not known: other machines, or a larger set.
    """

    def __init__(
        self,
        paths: Sequence[str],
        cache_dir: str | Path | None = None,
        storage: Storage = DEFAULT_STORAGE,
        refresh: bool = False,
    ) -> None:
        self.shards = [path if is_remote(path) else os.path.abspath(path) for path in paths]
        self.storage = storage
        self.refresh = refresh
        names = "\n".join(map(_identity, self.shards))
        self.name = "clipkit-index-" + hashlib.blake2b(os.fsencode(names), digest_size=8).hexdigest()
        if cache_dir:
            self.folders = [Path(cache_dir)]
        elif is_remote(self.shards[0]):
            self.folders = [_user_cache()]
        else:
            self.folders = [Path(self.shards[0]).parent, _user_cache()]
        self._beside = None if cache_dir or is_remote(self.shards[0]) else self.folders[0]
        self._fingerprints: dict[int, Fingerprint] = {}
        self._earlier: dict[tuple[str, Fingerprint], tuple[Index, int]] | None = None

    def fingerprints(self, numbers: Sequence[int]) -> list[Fingerprint]:
        """Returns size and stamp of these shards; all that cannot be read are reported at once."""
        new = [number for number in numbers if number not in self._fingerprints]
        found = fingerprints([self.shards[number] for number in new], self.storage)
        self._fingerprints.update(zip(new, found, strict=True))
        return [self._fingerprints[number] for number in numbers]

    def saved(self, trust_remote: bool = False) -> Index | None:
        """Returns the saved index of the set as it is now, or None.

        trust_remote: remote shards are not asked whether they are still the same.
        """
        if self.refresh:
            return None
        asked = [at for at, shard in enumerate(self.shards) if not (trust_remote and is_remote(shard))]
        now: list[Fingerprint | None] = [None] * len(self.shards)
        for number, found in zip(asked, self.fingerprints(asked), strict=True):
            now[number] = found
        loaded = (load_index(folder, self.name, self.shards, now) for folder in self.folders)
        return next((index for index in loaded if index is not None), None)

    def records(self) -> Path | None:
        """Returns the folder of the records, made if need be; None when nothing can be written anywhere."""
        for folder in self.folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                descriptor, probe = tempfile.mkstemp(dir=folder, prefix=".clipkit-")
                os.close(descriptor)
                os.unlink(probe)
                (folder / RECORDS).mkdir(exist_ok=True)
                return folder / RECORDS
            except OSError:
                continue
        return None

    def pending(self, numbers: Sequence[int]) -> list[int]:
        """Returns which of these shards have no valid record."""
        folder = self.records()
        if self.refresh or folder is None:
            return list(numbers)
        self.fingerprints(numbers)
        return [number for number in numbers if self._known(folder, number) is None]

    def _known(self, folder: Path, number: int) -> ShardScan | None:
        """What an earlier walk found in a shard that is still the same: from its record, or from an index."""
        now = self._fingerprints[number]
        return read_record(folder, self.shards[number], now) or self._indexed(number, now)

    def _indexed(self, number: int, now: Fingerprint) -> ShardScan | None:
        if self._earlier is None:
            self._earlier = {}
            for index in saved_indices(self._beside) if self._beside else ():
                # Sparse ones lack offsets, and to which shard ignored members belong is written nowhere.
                if index.stride == 1 and not index.ignored:
                    facts = zip(index.shards, index.sizes.tolist(), index.stamps.tolist(), strict=True)
                    for at, (shard, size, stamp) in enumerate(facts):
                        self._earlier[shard, (size, stamp)] = index, at
        found = self._earlier.get((self.shards[number], now))
        if found is None:
            return None
        index, at = found
        starts = np.array(index.offsets[index.first_entry[at] : index.first_entry[at + 1]])
        return ShardScan(*now, digest=index.digests[at], starts=starts, ignored=0)

    def discard_records(self, index: Index) -> None:
        """Removes the records of the set when its index lies beside the shards."""
        if self._beside is None or index.file is None or Path(index.file).parent != self._beside:
            return
        folder = self._beside / RECORDS
        # A folder that may no longer be written to keeps them: they do no harm.
        with contextlib.suppress(OSError):
            for shard in self.shards if folder.is_dir() else ():
                _record_path(folder, shard).unlink(missing_ok=True)
            folder.rmdir()

    def forecast(self, numbers: Sequence[int]) -> Forecast:
        """Returns what walking these shards will read."""
        sizes = [size for size, _ in self.fingerprints(numbers)]
        requests = sum(
            1 + -(-size // REMOTE_BLOCK)
            for number, size in zip(numbers, sizes, strict=True)
            if is_remote(self.shards[number])
        )
        return Forecast(len(sizes), sum(sizes), requests)

    def walk(
        self, numbers: Sequence[int], workers: int = 1, on_shard: OnShard | None = None
    ) -> Iterator[ShardScan]:
        """Yields the scans of these shards in order, from their records where they have one.

        `workers` processes walk the others; each leaves its record. Raises DataError of any damage.
        """
        folder = self.records()
        pending = self.pending(numbers)
        left = set(pending)
        scan = partial(_scan_and_record, folder=folder, storage=self.storage)
        engine = Engine(max(1, min(workers, len(pending) // 4)))
        walked = engine.map(scan, ((self.shards[number],) for number in pending))
        try:
            for done, number in enumerate(numbers, 1):
                found = None
                if number not in left and folder is not None:
                    found = self._known(folder, number)
                yield (found or scan(self.shards[number])) if number not in left else next(walked)
                if on_shard is not None:
                    on_shard(done, len(numbers))
        except OSError as error:
            raise DataError(
                f"{error.filename or 'a shard'}: {error.strerror or error}", "check the storage and try again"
            ) from None

    def finish(self, workers: int = 1, on_shard: OnShard | None = None) -> Index:
        """Returns the index of the whole set, saved if a folder takes it."""
        everything = range(len(self.shards))
        self.fingerprints(everything)
        index = assemble(self.shards, self.walk(everything, workers, on_shard))
        if not index.num_samples:
            raise DataError(
                f"no sample in {len(self.shards)} shard(s), first {self.shards[0]}",
                "give shards that hold samples",
            )
        index = self.adopt(index)
        self.discard_records(index)
        return index

    def adopt(self, index: Index) -> Index:
        """Returns the index mapped from the file it is saved to, or as it is when no folder takes it."""
        saved = (save_index(folder, self.name, index) for folder in self.folders)
        return next((mapped for mapped in saved if mapped is not None), index)


def build_index(
    paths: Sequence[str],
    cache_dir: str | Path | None = None,
    workers: int = 1,
    *,
    on_shard: OnShard | None = None,
    refresh: bool = False,
    storage: Storage = DEFAULT_STORAGE,
) -> Index:
    """Returns the index of the shards, from the cache if all of them still are what they were.

    `workers` processes walk the shards, `on_shard(done, total)` is called as they finish; `refresh` ignores
    the cache. Raises DataError naming shard, member and byte of any damage.
    """
    work = Indexing(paths, cache_dir, storage, refresh)
    return work.saved() or work.finish(workers, on_shard)


def _scan_and_record(shard: str, folder: Path | None, storage: Storage) -> ShardScan:
    scan = scan_shard(shard, storage)
    if folder is not None:
        write_record(folder, shard, scan)
    return scan


def _record_path(folder: Path, shard: str) -> Path:
    name = hashlib.blake2b(os.fsencode(_identity(shard)), digest_size=12).hexdigest()
    return folder / f"{name}.npz"


def write_record(folder: Path, shard: str, scan: ShardScan) -> None:
    """Writes what the walk over one shard found, by an atomic rename; a full disk costs the record only."""
    facts = {"version": _RECORD_VERSION, **scan._asdict()}
    del facts["starts"]
    steps = np.diff(scan.starts, prepend=0) // BLOCK
    try:
        with replacing(_record_path(folder, shard)) as out:
            np.savez_compressed(
                out,
                facts=np.frombuffer(json.dumps(facts).encode(), np.uint8),
                steps=steps,
                allow_pickle=False,
            )
    except OSError:
        return


def read_record(folder: Path, shard: str, now: Fingerprint) -> ShardScan | None:
    """Returns what an earlier walk found in a shard that is still the same, or None."""
    try:
        # Read first: numpy leaves the file open when it holds no archive.
        content = io.BytesIO(_record_path(folder, shard).read_bytes())
        with np.load(content, allow_pickle=False) as stored:
            facts = json.loads(bytes(stored["facts"]))
            if facts.pop("version") != _RECORD_VERSION or (facts["size"], facts["stamp"]) != now:
                return None
            return ShardScan(starts=np.cumsum(stored["steps"].astype(np.int64)) * BLOCK, **facts)
    except _RECORD_ERRORS:
        # A missing or damaged record costs another walk over its shard.
        return None


def _identity(shard: str) -> str:
    """A shard's name without logins and signatures, which come and go; only hashes of it are written."""
    if not is_remote(shard):
        return shard
    parts = urlsplit(shard)
    query = "&".join(part for part in parts.query.split("&") if not _PASSING.match(part))
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, query, ""))


def _thin(scan: ShardScan) -> ShardScan:
    """Keeps every 16th offset and the end; the count moves to the front as a negative number."""
    count = len(scan.starts) - 1
    kept = np.concatenate([[-count], scan.starts[:count:SPARSE_STRIDE], scan.starts[-1:]])
    return scan._replace(starts=kept)


def assemble(shards: Sequence[str], found: Iterable[ShardScan]) -> Index:
    """Returns the index of these shards, in memory, from their scans in the same order."""
    scans: list[ShardScan] = []
    total = 0
    sparse = False
    for scan in found:
        total += len(scan.starts) - 1
        if total > DENSE_SAMPLES:
            if not sparse:
                scans = [_thin(earlier) for earlier in scans]
            sparse = True
            scan = _thin(scan)
        scans.append(scan)
    counts = [int(-scan.starts[0]) if sparse else len(scan.starts) - 1 for scan in scans]
    return Index(
        shards=tuple(shards),
        counts=np.array(counts, dtype=np.int64),
        sizes=np.array([scan.size for scan in scans], dtype=np.int64),
        stamps=np.array([scan.stamp for scan in scans], dtype=np.int64),
        digests=tuple(scan.digest for scan in scans),
        ignored=sum(scan.ignored for scan in scans),
        stride=SPARSE_STRIDE if sparse else 1,
        offsets=np.concatenate([scan.starts[1:] if sparse else scan.starts for scan in scans]),
    )


def _user_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "clipkit" / "index"
