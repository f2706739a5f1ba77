"""One index for all ranks of a starting job: found by the main rank, or walked by all of them together."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clipkit import dist
from clipkit.data.indexing import Indexing
from clipkit.data.options import LoaderOptions
from clipkit.data.source import is_remote
from clipkit.data.tar_index import Index
from clipkit.data.waiting import together
from clipkit.types import DataError


def shared_index(shards: list[str], options: LoaderOptions, world: dist.World) -> Index:
    """Returns the index of the shards; called by all ranks. An error of one of them reaches every rank.

    The main rank saves what it finds and the others load it, from a common folder or from what it sends.
    """
    processes = max(1, min(options.workers, os.cpu_count() or 1))
    work = Indexing(shards, options.index_dir, options.storage)
    common = any(map(is_remote, shards))

    def look() -> tuple[Index | None, str | None]:
        index = work.saved() if world.is_main else None
        folder = work.records() if world.is_main and index is None and world.size > 1 else None
        return index, None if folder is None else str(folder)

    index, folder = together(look)
    missing = not _first(dist.gather_objects(index is not None))
    folder = _first(dist.gather_objects(folder))
    if missing and folder is not None:
        # Ranks on a machine that does not see the folder of the main rank would walk in vain.
        seen = Path(folder).parent in work.folders and os.path.isdir(folder)
        mine = range(world.rank, len(shards), world.size) if seen else range(0)
        together(lambda: sum(1 for _ in work.walk(mine, processes)) if mine else 0)
    if missing:
        index = together(lambda: work.finish(processes) if world.is_main else None)
    if not world.is_main:
        index = None
    loaded = together(lambda: index or _load(work, common, processes, world))
    if common:
        loaded = _sent(work, loaded, world)
    assert loaded is not None
    if len(set(dist.gather_objects(loaded.sha))) > 1:
        raise DataError("the processes see different shards", "give every machine the same files")
    if world.is_main:
        # Those of a first epoch without an index, and of a walk that was killed at its very end.
        work.discard_records(loaded)
    return loaded


def _load(work: Indexing, common: bool, processes: int, world: dist.World) -> Index | None:
    """What another rank finds: of local shards it makes its own index if need be, of remote ones never."""
    if world.is_main:
        return None
    found = work.saved(trust_remote=True)
    return found if found is not None or common else work.finish(processes)


def _sent(work: Indexing, index: Index | None, world: dist.World) -> Index | None:
    """Sends the index to the ranks that found none."""
    if all(dist.gather_objects(index is not None)):
        return index
    whole = None
    if world.is_main and index is not None:
        whole = replace(index, offsets=np.array(index.offsets), file=None)
    sent = _first(dist.gather_objects(whole))
    return index if index is not None or sent is None else work.adopt(sent)


def _first(values: list[Any]) -> Any:
    return values[0]
