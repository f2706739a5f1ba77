"""From images and captions as they lie on a disk to shards: readers of many layouts, one writer.

`open_collection` finds out what a path holds and lists it; `make_shards` and `make_evaluation_set` write it.
Loads no torch.
"""

from __future__ import annotations

from clipkit.data.making.collection import Collection, Entry, Reading
from clipkit.data.making.images import ImageRules
from clipkit.data.making.opening import open_collection
from clipkit.data.making.writing import MakeJob, Making, make_evaluation_set, make_shards

__all__ = [
    "Collection",
    "Entry",
    "ImageRules",
    "MakeJob",
    "Making",
    "Reading",
    "make_evaluation_set",
    "make_shards",
    "open_collection",
]
