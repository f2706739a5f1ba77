"""Data: from tar shards to batches, in an order that is a pure function of (seed, epoch, position).

The names below load what they need when they are first used: walking and indexing shards needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipkit.data.loader import TrainStream, open_train
    from clipkit.data.options import CaptionField, LoaderOptions, Source
    from clipkit.data.rejects import RejectBudget
    from clipkit.data.tar_index import Index, build_index, expand_shards
    from clipkit.data.text import TextView
    from clipkit.data.views import ImageView

_HOMES = {
    "CaptionField": "options",
    "ImageView": "views",
    "Index": "tar_index",
    "LoaderOptions": "options",
    "RejectBudget": "rejects",
    "Source": "options",
    "TextView": "text",
    "TrainStream": "loader",
    "build_index": "tar_index",
    "expand_shards": "tar_index",
    "open_train": "loader",
}

__all__ = [
    "CaptionField",
    "ImageView",
    "Index",
    "LoaderOptions",
    "RejectBudget",
    "Source",
    "TextView",
    "TrainStream",
    "build_index",
    "expand_shards",
    "open_train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
