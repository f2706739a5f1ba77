"""The index of a set of shards: sample counts and byte offsets, found once by a strict walk and cached.

The offset of every sample is kept up to about a million samples, beyond that of every 16th: a set of 500
million samples costs 250 MB, memory-mapped, one copy per machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.data.scan import ShardScan, scan_shard
from clipkit.data.source import expand_shards
from clipkit.types import DataError

__all__ = ["Index", "build_index", "expand_shards"]

FORMAT_VERSION = 1
SPARSE_STRIDE = 16
DENSE_SAMPLES = 1 << 20


@dataclass(frozen=True, eq=False)
class Index:
    """Counts and offsets of all shards, in order. Sample ids are 0..num_samples-1 in this order.

    stride       samples between two stored offsets
    offsets      int64; for each shard ceil(count / stride) sample offsets and the end of its last sample
    ignored      members that belong to no sample (folders, hidden files, names without an extension)
    file         the .npy file that `offsets` is mapped from, or None
    """

    shards: tuple[str, ...]
    counts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    mtimes: NDArray[np.int64]
    digests: tuple[str, ...]
    ignored: int
    stride: int
    offsets: NDArray[np.int64]
    file: str | None = None

    @cached_property
    def num_samples(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def first_id(self) -> NDArray[np.int64]:
        """(S + 1,), id of the first sample of each shard."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    @cached_property
    def first_entry(self) -> NDArray[np.int64]:
        """(S + 1,), position of each shard in `offsets`."""
        return np.concatenate([[0], np.cumsum(-(-self.counts // self.stride) + 1)])

    @cached_property
    def sample_bytes(self) -> float:
        """Mean bytes of a sample, headers included."""
        return float(self.sizes.sum()) / max(1, self.num_samples)

    @cached_property
    def sha(self) -> str:
        """Identity of the contents: counts, sizes and headers of all shards, whatever their folder or age."""
        state = hashlib.blake2b(b"clipkit index 1", digest_size=16)
        for count, size, digest in zip(self.counts.tolist(), self.sizes.tolist(), self.digests, strict=True):
            state.update(f"{count} {size} {digest}\n".encode())
        return state.hexdigest()

    def locate(self, sample: int) -> tuple[int, int]:
        """Returns (shard, position within the shard) of a sample id."""
        shard = int(np.searchsorted(self.first_id, sample, side="right")) - 1
        return shard, sample - int(self.first_id[shard])

    def span(self, shard: int, first: int, last: int) -> tuple[int, int, int, int]:
        """Returns (first sample, count, first byte, end byte) of the stored pieces holding first..last."""
        a, b = first // self.stride, last // self.stride + 1
        entry = int(self.first_entry[shard])
        begin = a * self.stride
        stop = min(b * self.stride, int(self.counts[shard]))
        return begin, stop - begin, int(self.offsets[entry + a]), int(self.offsets[entry + b])

    def __getstate__(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if self.file:
            # Workers map the file again instead of receiving a copy each.
            state["offsets"] = len(self.offsets)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["file"]:
            length = state["offsets"]
            state["offsets"] = _map_offsets(state["file"], length)
        self.__dict__.update(state)


def _map_offsets(path: str, length: int) -> NDArray[np.int64]:
    offsets: NDArray[np.int64] = np.load(path, mmap_mode="r", allow_pickle=False)
    if offsets.dtype != np.int64 or offsets.shape != (length,):
        raise DataError(f"index file {path} does not fit its header", "delete it and start again")
    return offsets


def build_index(
    paths: Sequence[str],
    cache_dir: str | Path | None = None,
    workers: int = 1,
    *,
    on_shard: Callable[[int, int], None] | None = None,
    refresh: bool = False,
) -> Index:
    """Returns the index of the shards, from the cache if size and modification time of all still match.

    The cache lies in `cache_dir`, by default beside the first shard, or in the user's cache folder when that
    cannot be written. `workers` processes walk the shards, `on_shard(done, total)` is called as they finish;
    `refresh` ignores the cache. Raises DataError naming shard, member and byte of any damage.
    """
    shards = [os.path.abspath(path) for path in paths]
    fingerprints = _fingerprints(shards)
    name = "clipkit-index-" + hashlib.blake2b(os.fsencode("\n".join(shards)), digest_size=8).hexdigest()
    folders = [Path(cache_dir)] if cache_dir else [Path(shards[0]).parent, _user_cache()]
    if not refresh:
        for folder in folders:
            index = _load(folder, name, shards, fingerprints)
            if index is not None:
                return index
    index = _assemble(shards, _scan_all(shards, workers, on_shard))
    if not index.num_samples:
        raise DataError(
            f"no sample in {len(shards)} shard(s), first {shards[0]}", "give shards that hold samples"
        )
    for folder in folders:
        saved = _save(folder, name, index)
        if saved is not None:
            return saved
    return index


def _fingerprints(shards: list[str]) -> list[tuple[int, int]]:
    """(size, mtime) of every shard; all that cannot be read are reported at once."""
    found, problems = [], []
    for shard in shards:
        try:
            status = os.stat(shard)
            if not stat.S_ISREG(status.st_mode):
                problems.append(f"{shard} (not a file)")
                continue
            if not os.access(shard, os.R_OK):
                problems.append(f"{shard} (permission denied)")
                continue
            found.append((status.st_size, status.st_mtime_ns))
        except OSError as error:
            dangling = (
                " (dangling link)"
                if os.path.islink(shard)
                else f" ({(error.strerror or 'unreadable').lower()})"
            )
            problems.append(shard + dangling)
    if problems:
        first = ", ".join(problems[:5])
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError(
            f"{len(problems)} of {len(shards)} shards cannot be read: {first}{more}",
            "correct data.train or bring the shards back",
        )
    return found


def _scan_all(
    shards: list[str], workers: int, on_shard: Callable[[int, int], None] | None
) -> list[ShardScan]:
    scans: list[ShardScan] = []
    total = 0
    workers = min(workers, len(shards) // 4)
    pool = ProcessPoolExecutor(workers) if workers > 1 else None
    try:
        results = pool.map(scan_shard, shards) if pool else map(scan_shard, shards)
        for scan in results:
            before, total = total, total + len(scan.starts) - 1
            if total > DENSE_SAMPLES:
                if before <= DENSE_SAMPLES:
                    scans = [_thin(earlier) for earlier in scans]
                scan = _thin(scan)
            scans.append(scan)
            if on_shard is not None:
                on_shard(len(scans), len(shards))
    except OSError as error:
        raise DataError(
            f"{error.filename or 'a shard'}: {error.strerror}", "check the storage and try again"
        ) from None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return scans


def _thin(scan: ShardScan) -> ShardScan:
    """Keeps every 16th offset and the end; the count moves to the front as a negative number."""
    count = len(scan.starts) - 1
    kept = np.concatenate([[-count], scan.starts[:count:SPARSE_STRIDE], scan.starts[-1:]])
    return scan._replace(starts=kept)


def _assemble(shards: list[str], scans: list[ShardScan]) -> Index:
    sparse = any(len(scan.starts) and scan.starts[0] < 0 for scan in scans)
    counts = [int(-scan.starts[0]) if sparse else len(scan.starts) - 1 for scan in scans]
    return Index(
        shards=tuple(shards),
        counts=np.array(counts, dtype=np.int64),
        sizes=np.array([scan.size for scan in scans], dtype=np.int64),
        mtimes=np.array([scan.mtime_ns for scan in scans], dtype=np.int64),
        digests=tuple(scan.digest for scan in scans),
        ignored=sum(scan.ignored for scan in scans),
        stride=SPARSE_STRIDE if sparse else 1,
        offsets=np.concatenate([scan.starts[1:] if sparse else scan.starts for scan in scans]),
    )


def _user_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "clipkit" / "index"


def _save(folder: Path, name: str, index: Index) -> Index | None:
    """Writes offsets, then the header that names them, each by an atomic rename. None: the folder refuses."""
    offsets = np.ascontiguousarray(index.offsets)
    file = f".{name}-{index.sha[:12]}.npy"
    header = {
        "format_version": FORMAT_VERSION,
        "shards": list(index.shards),
        "counts": index.counts.tolist(),
        "sizes": index.sizes.tolist(),
        "mtimes": index.mtimes.tolist(),
        "digests": list(index.digests),
        "ignored": index.ignored,
        "stride": index.stride,
        "offsets": file,
        "offsets_sha": hashlib.blake2b(offsets.data, digest_size=16).hexdigest(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _replacing(folder / file) as out:
            np.save(out, offsets, allow_pickle=False)
        with _replacing(folder / f".{name}.json") as out:
            out.write(json.dumps(header).encode())
        for old in folder.glob(f".{name}-*.npy"):
            if old.name != file:
                old.unlink(missing_ok=True)
        path = str(folder / file)
        return Index(**{**index.__getstate__(), "offsets": _map_offsets(path, len(offsets)), "file": path})
    except OSError:
        # A read-only folder is normal for shared data: the caller tries the next, or keeps it in memory.
        return None


class _replacing:
    """Context manager: a file that takes its name only when it was written completely."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        descriptor, self.temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".clipkit-")
        self.file = os.fdopen(descriptor, "wb")
        return self.file

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()
        if kind is None:
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(self.temporary, 0o666 & ~umask)
            os.replace(self.temporary, self.path)
        else:
            os.unlink(self.temporary)


def _load(folder: Path, name: str, shards: list[str], fingerprints: list[tuple[int, int]]) -> Index | None:
    """Returns the cached index if it is whole and every shard still has its size and time; else None."""
    try:
        header = json.loads((folder / f".{name}.json").read_bytes())
        if header["format_version"] != FORMAT_VERSION or header["shards"] != shards:
            return None
        if list(zip(header["sizes"], header["mtimes"], strict=True)) != fingerprints:
            return None
        path = str(folder / Path(header["offsets"]).name)
        offsets = np.load(path, mmap_mode="r", allow_pickle=False)
        if (
            hashlib.blake2b(np.ascontiguousarray(offsets).data, digest_size=16).hexdigest()
            != header["offsets_sha"]
        ):
            return None
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        # A missing or damaged cache is rebuilt from the shards.
        return None
    return Index(
        shards=tuple(shards),
        counts=np.array(header["counts"], dtype=np.int64),
        sizes=np.array(header["sizes"], dtype=np.int64),
        mtimes=np.array(header["mtimes"], dtype=np.int64),
        digests=tuple(header["digests"]),
        ignored=int(header["ignored"]),
        stride=int(header["stride"]),
        offsets=offsets,
        file=path,
    )
