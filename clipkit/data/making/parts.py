"""What a worker does with a part of a collection: writes its shard, or says what it would take up."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.data.indexing import RECORDS, write_record
from clipkit.data.making.collection import Entry, Images
from clipkit.data.making.images import ImageRules
from clipkit.data.making.samples import Layout, Tally, usable
from clipkit.data.scan import scan_shard
from clipkit.data.shards import write_members
from clipkit.data.tar_format import BLOCK


def make_part(
    path: Path, layout: Layout, images: Images, rules: ImageRules, first: int, entries: list[Entry]
) -> dict[str, Any]:
    """Writes one shard and returns what became of its entries; no shard without a usable one."""
    tally = Tally()
    members = usable(entries, first, layout, images, rules, tally)
    begin = next(members, None)
    record = None
    if begin is not None:
        record = write_members(path, itertools.chain([begin], members))
        if layout.train:
            # Training finds the index of the set without another walk.
            shard = os.path.abspath(path)
            write_record(path.parent / RECORDS, shard, scan_shard(shard))
    return {**tally.outcome(len(entries)), "record": None if record is None else vars(record)}


def survey_part(
    layout: Layout, images: Images, rules: ImageRules, first: int, entries: list[Entry]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns what each entry takes up in a tar (0: nothing, it is refused), and what became of them."""
    tally = Tally()
    sizes = np.zeros(len(entries), dtype=np.int64)
    for number, entry in enumerate(entries):
        for members in usable([entry], first + number, layout, images, rules, tally):
            contents = [value for name, value in members.items() if name != "__key__"]
            sizes[number] = sum(BLOCK * (1 - -len(value) // BLOCK) for value in contents)
    return sizes, {**tally.outcome(len(entries)), "record": None}
