"""Data: from tar shards to batches, in an order that is a pure function of (seed, epoch, position).

The names below load what they need when they are first used: walking and indexing shards needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipkit.data.indexing import build_index
    from clipkit.data.loader import TrainStream, open_train
    from clipkit.data.options import CaptionField, LoaderOptions, Source
    from clipkit.data.recipes import read_recipes
    from clipkit.data.rejects import RejectBudget
    from clipkit.data.source import expand_shards
    from clipkit.data.tar_index import Index
    from clipkit.data.text import TextView, text_view
    from clipkit.data.views import ImageView, image_view

_HOMES = {
    "CaptionField": "options",
    "ImageView": "views",
    "Index": "tar_index",
    "LoaderOptions": "options",
    "RejectBudget": "rejects",
    "Source": "options",
    "TextView": "text",
    "TrainStream": "loader",
    "build_index": "indexing",
    "expand_shards": "source",
    "image_view": "views",
    "open_train": "loader",
    "read_recipes": "recipes",
    "text_view": "text",
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
    "image_view",
    "open_train",
    "read_recipes",
    "text_view",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
