"""The index of a set of shards: sample counts and byte offsets, found once by a strict walk and cached.

The offset of every sample is kept up to about a million samples, beyond that of every 16th: a set of 500
million samples costs 250 MB, memory-mapped, one copy per machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.redaction import redact
from clipkit.types import DataError

FORMAT_VERSION = 2
_CACHE_ERRORS = (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError, OverflowError)
SPARSE_STRIDE = 16


@dataclass(frozen=True, eq=False)
class Index:
    """Counts and offsets of all shards, in order. Sample ids are 0..num_samples-1 in this order.

    stride       samples between two stored offsets
    offsets      int64; for each shard ceil(count / stride) sample offsets and the end of its last sample
    stamps       int64 (S,), modification times in ns; of remote shards 63 bits of ETag or time, 0 for neither
    ignored      members that belong to no sample (folders, hidden files, names without an extension)
    file         the .npy file that `offsets` is mapped from, or None
    """

    shards: tuple[str, ...]
    counts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    stamps: NDArray[np.int64]
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


def save_index(folder: Path, name: str, index: Index) -> Index | None:
    """Writes offsets, then the header that names them, each by an atomic rename; returns the mapped index.

    None: the folder refuses.
    """
    offsets = np.ascontiguousarray(index.offsets)
    file = f".{name}-{index.sha[:12]}.npy"
    header = {
        "format_version": FORMAT_VERSION,
        "shards": _shown(index.shards),
        "counts": index.counts.tolist(),
        "sizes": index.sizes.tolist(),
        "stamps": index.stamps.tolist(),
        "digests": list(index.digests),
        "ignored": index.ignored,
        "stride": index.stride,
        "offsets": file,
        "offsets_sha": hashlib.blake2b(offsets.data, digest_size=16).hexdigest(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / file) as out:
            np.save(out, offsets, allow_pickle=False)
        with replacing(folder / f".{name}.json") as out:
            out.write(json.dumps(header).encode())
        for old in folder.glob(f".{name}-*.npy"):
            if old.name != file:
                old.unlink(missing_ok=True)
        path = str(folder / file)
        return Index(**{**index.__getstate__(), "offsets": _map_offsets(path, len(offsets)), "file": path})
    except OSError:
        # A read-only folder is normal for shared data: the caller tries the next, or keeps it in memory.
        return None


def load_index(
    folder: Path, name: str, shards: Sequence[str], fingerprints: Sequence[tuple[int, int] | None]
) -> Index | None:
    """Returns the cached index if it is whole and every shard still has its size and stamp; else None.

    A shard whose fingerprint is None is taken to be what it was.
    """
    try:
        header = json.loads((folder / f".{name}.json").read_bytes())
        if header["format_version"] != FORMAT_VERSION or header["shards"] != _shown(shards):
            return None
        held = zip(header["sizes"], header["stamps"], fingerprints, strict=True)
        if any(found is not None and (size, stamp) != found for size, stamp, found in held):
            return None
        return _index_of(folder, header, shards)
    except _CACHE_ERRORS:
        # A missing or damaged cache is rebuilt from the shards.
        return None


def saved_indices(folder: Path) -> Iterator[Index]:
    """Yields the whole indices in a folder, of any list of shards, as they were when they were saved."""
    for file in sorted(folder.glob(".clipkit-index-*.json")):
        try:
            header = json.loads(file.read_bytes())
            if header["format_version"] != FORMAT_VERSION:
                continue
            found = _index_of(folder, header, header["shards"])
        except _CACHE_ERRORS:
            continue
        if found is not None:
            yield found


def _index_of(folder: Path, header: dict[str, Any], shards: Sequence[str]) -> Index | None:
    path = str(folder / Path(header["offsets"]).name)
    offsets = np.load(path, mmap_mode="r", allow_pickle=False)
    if _file_sha(path, offsets.nbytes) != header["offsets_sha"]:
        return None
    index = Index(
        shards=tuple(shards),
        counts=np.array(header["counts"], dtype=np.int64),
        sizes=np.array(header["sizes"], dtype=np.int64),
        stamps=np.array(header["stamps"], dtype=np.int64),
        digests=tuple(header["digests"]),
        ignored=int(header["ignored"]),
        stride=int(header["stride"]),
        offsets=offsets,
        file=path,
    )
    whole = len(index.counts) == len(index.digests) == len(shards) and index.stride > 0
    return index if whole and offsets.shape == (index.first_entry[-1],) else None


def _shown(shards: Sequence[str]) -> list[str]:
    """The names for the file: those of remote shards without secrets."""
    # Of all at once: a set can have a hundred thousand.
    return redact("\n".join(shards)).split("\n") if any("://" in shard for shard in shards) else [*shards]


def _file_sha(path: str, length: int) -> str:
    """The hash of the last `length` bytes of a file, without mapping them into this process."""
    state = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        file.seek(-length, os.SEEK_END)
        while piece := file.read(1 << 20):
            state.update(piece)
    return state.hexdigest()


class replacing:
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
