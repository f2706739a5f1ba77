"""Models in and out: an open_clip directory is the native format of an exported model."""

from __future__ import annotations

from clipkit.export.load import export, load, load_towers
from clipkit.export.open_clip import (
    exported_tensors,
    load_open_clip,
    location_note,
    save_open_clip,
    verify,
)

__all__ = [
    "export",
    "exported_tensors",
    "load",
    "load_open_clip",
    "load_towers",
    "location_note",
    "save_open_clip",
    "verify",
]
