"""Pairs that are never trained on, picked by a hash of their keys: which ones, found once by a walk.

    hash     64 bits of the key (its folder within the shard included), of nothing else: no seed, no shard
    share    p of the pairs: those whose hash is below p * 2^64, whatever else is in the set
    number   the n smallest hashes

Samples with one key have one hash: wherever they stand they are held out together, or none of them. Where
keys repeat, a number is therefore reached or exceeded, never missed. Of several sources all samples count
together, so each gives in proportion to its size. A pair held out of a set is also held
out of any larger one by the same share; by the same number a larger set may give it back, and takes only
pairs that it brings itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipkit import dist
from clipkit.data.engine import Engine
from clipkit.data.kept import Kept
from clipkit.data.options import LoaderOptions, Storage
from clipkit.data.order import Ids
from clipkit.data.scan import opened_walk
from clipkit.data.source import changed
from clipkit.data.tar_index import Index, replacing
from clipkit.data.waiting import together
from clipkit.types import ConfigError, DataError

_VERSION = 1
_HASHES = 1 << 64
_RECORD_ERRORS = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)

Hashed = tuple[Ids, NDArray[np.uint64]]
"""Positions or ids of samples, and the hashes of their keys."""


def key_hash(key: str) -> int:
    """Returns the 64 bits of a key that decide whether it is held out."""
    name = key.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8, person=b"clipkit holdout").digest(), "little")


def kept_samples(index: Index, options: LoaderOptions) -> Kept:
    """Returns what is trained on: all samples, or those that `data.holdout` leaves; called by all ranks.

    The headers of all shards are walked for their keys, by all ranks together; the outcome is kept beside the
    index. Raises ConfigError when nothing is held out or nothing left, DataError for shards that changed.
    """
    if options.holdout is None:
        return Kept(index)
    wanted, total = options.holdout, index.num_samples
    if isinstance(wanted, int) and wanted >= total:
        raise ConfigError(
            f"data.holdout: {wanted:,} of {total:,} pairs leaves none to train on",
            "hold out fewer, or a share such as 1%",
        )
    record = _record_path(index, wanted)
    main = dist.World.current().is_main
    held: Ids | None = dist.gather_objects(_read_record(record, index) if main else None)[0]
    if held is None:
        held = _selected(index, wanted, options)
        if main:
            _write_record(record, Kept(index, held))
    kept = Kept(index, held)
    if not len(held):
        raise ConfigError(
            f"data.holdout: {100 * wanted:g}% holds out none of the {total:,} pairs",
            "give the number of pairs to hold out",
        )
    if not kept.num_samples:
        raise ConfigError(
            f"data.holdout: {wanted:,} pairs hold out all {total:,}, because they have the same key",
            "write the shards again with a key of its own for every pair",
        )
    return kept


def _selected(index: Index, wanted: int | float, options: LoaderOptions) -> Ids:
    """The ids that are held out, ascending."""
    if isinstance(wanted, float):
        return np.sort(_below(index, wanted, options)[0])
    # So many hashes are expected below this share that eight standard deviations still leave enough.
    share = (wanted + 8 * math.sqrt(wanted) + 64) / index.num_samples
    ids, hashes = _below(index, share, options)
    while len(ids) < wanted:
        share *= 4
        ids, hashes = _below(index, share, options)
    last = np.partition(hashes, wanted - 1)[wanted - 1]
    return np.sort(ids[hashes <= last])


def _below(index: Index, share: float, options: LoaderOptions) -> Hashed:
    """Ids and hashes of the samples whose hash is below a share of all hashes; the same on every rank."""
    limit = min(_HASHES, math.ceil(share * _HASHES))
    world = dist.World.current()
    mine = range(world.rank, len(index.shards), world.size)
    processes = max(1, min(options.workers, os.cpu_count() or 1, len(mine) // 4))

    def walk() -> Hashed:
        parts = (
            (index.shards[shard], int(index.counts[shard]), index.digests[shard], limit, options.storage)
            for shard in mine
        )
        found = Engine(processes).map(shard_hashes, parts)
        return _joined(
            (positions + index.first_id[shard], hashes)
            for shard, (positions, hashes) in zip(mine, found, strict=True)
        )

    return _joined(dist.gather_objects(together(walk)))


def shard_hashes(shard: str, count: int, digest: str, limit: int, storage: Storage) -> Hashed:
    """Returns the samples of a shard whose key has a hash below `limit`: positions and hashes.

    Raises DataError when the shard is not the one with this count and this digest of its headers.
    """
    positions: list[int] = []
    hashes: list[int] = []
    passed = 0
    try:
        with opened_walk(shard, storage) as walked:
            for span in walked.samples():
                hashed = key_hash(span.key)
                if hashed < limit:
                    positions.append(passed)
                    hashes.append(hashed)
                passed += 1
            found = walked.digest
    except OSError as error:
        raise DataError(
            f"{shard}: cannot be read ({error.strerror or error})", "check the storage and try again"
        ) from error
    if (passed, found) != (count, digest):
        raise changed(shard, f"{passed} samples instead of {count}, or other ones")
    return np.array(positions, dtype=np.int64), np.array(hashes, dtype=np.uint64)


def _joined(parts: Iterable[Hashed]) -> Hashed:
    found = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64)), *parts]
    return np.concatenate([ids for ids, _ in found]), np.concatenate([hashes for _, hashes in found])


def _record_path(index: Index, wanted: int | float) -> Path | None:
    """Beside the index; None where the index is in memory only."""
    if index.file is None:
        return None
    name = hashlib.blake2b(f"{_VERSION} {index.sha} {wanted!r}".encode(), digest_size=8).hexdigest()
    return Path(index.file).parent / f".clipkit-holdout-{name}.npz"


def _read_record(path: Path | None, index: Index) -> Ids | None:
    if path is None:
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            held: Ids = stored["held"]
            whole = str(stored["sha"]) == Kept(index, held).sha and held.dtype == np.int64
    except _RECORD_ERRORS:
        # A missing or damaged record costs another walk.
        return None
    return held if whole else None


def _write_record(path: Path | None, kept: Kept) -> None:
    if path is None or kept.sha is None:
        return
    # A folder that may no longer be written to costs another walk at the next start.
    with contextlib.suppress(OSError), replacing(path) as out:
        np.savez(out, held=kept.held, sha=np.array(kept.sha), allow_pickle=False)
