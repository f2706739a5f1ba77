"""Labelled images, read as the evaluation commands read them, as a collection to make shards from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from clipkit.data.glyphs.faces import encode_png
from clipkit.data.making.annotations import choose_splits
from clipkit.data.making.collection import Entry, Found, Images, Reading, refuse_splits
from clipkit.data.making.opening import Reader
from clipkit.data.making.tables import with_templates
from clipkit.data.tables import ImageRoot
from clipkit.evaluation.folders import find_idx, read_idx_pair, read_image_folder, split_folders
from clipkit.evaluation.images import ArrayImages, FileImages, ZipImages, read_idx
from clipkit.evaluation.sets import ClassificationSet
from clipkit.evaluation.tables import read_labels
from clipkit.types import ConfigError

_FIELDS = ("path", "label", "class_name")


def _labels(path: Path, reading: Reading) -> Found:
    refuse_splits(path, reading)
    return _found("labels", read_labels(path), path.parent, reading)


def _image_folder(path: Path, reading: Reading) -> Found:
    splits = split_folders(path)
    if not splits:
        refuse_splits(path, reading)
        return _found("imagefolder", read_image_folder(path), path, reading)
    chosen = _one(path, splits, reading)
    return _found("imagefolder", read_image_folder(path, chosen), path, reading)


def _idx(path: Path, reading: Reading) -> Found:
    pairs = find_idx(path)
    if list(pairs) == [""]:
        refuse_splits(path, reading)
    chosen = _one(path, tuple(pairs), reading)
    return _found("idx", read_idx_pair(*pairs[chosen]), path, reading)


def _one(path: Path, splits: tuple[str, ...], reading: Reading) -> str:
    chosen = choose_splits(str(path), splits, reading)
    if len(chosen) > 1:
        raise ConfigError(f"{path}: read one split at a time", "make shards of each split")
    return chosen[0]


READERS: dict[str, Reader] = {"labels": _labels, "imagefolder": _image_folder, "idx": _idx}


def _found(kind: str, data: ClassificationSet, base: Path, reading: Reading) -> Found:
    if reading.image_key or reading.captions or reading.images:
        raise ConfigError(
            f"{data.source}: labelled images have no columns of captions",
            "leave --image-key, --caption-key and --images out, or name the layout with --from",
        )
    kept = reading.keep or ()
    for name in kept:
        if name not in _FIELDS:
            raise ConfigError(
                f"{data.source}: no field '{name}' (found: {', '.join(_FIELDS)})", "correct --keep"
            )
    names = data.classnames(reading.classnames)
    images, paths = _images(data, base)

    def entries() -> Iterator[Entry]:
        for number, label in enumerate(data.labels.tolist()):
            path = str(number) if paths is None else paths(number)
            known = {"path": path, "label": label, "class_name": names[label]}
            entry = Entry(number, path, (), None, {name: known[name] for name in kept})
            yield with_templates(entry, label, names, reading.templates)

    used = f"{len(names):,} classes"
    return Found(kind, images, entries, _FIELDS, kept, used, classnames=names, templates=data.templates)


def _images(data: ClassificationSet, base: Path) -> tuple[Images, Callable[[int], str] | None]:
    """Returns the images by reference, small enough to travel to workers, and the names they go by there."""
    images = data.images
    if isinstance(images, ZipImages):
        return ImageRoot(images.path), images.entries.__getitem__
    if isinstance(images, FileImages):
        return ImageRoot(base), lambda number: os.path.relpath(images.paths[number], base)
    assert isinstance(images, ArrayImages)
    return IdxImages(images.path), None


@dataclass
class IdxImages:
    """The images of an idx file as PNG; an image is known by its number."""

    path: Path
    _pixels: np.ndarray | None = field(default=None, init=False, repr=False)

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_pixels": None}

    def read(self, image: str, size: int = -1) -> bytes:
        """Returns the first `size` bytes of the PNG (all by default)."""
        if self._pixels is None:
            self._pixels = read_idx(self.path, 3)
        content = encode_png(Image.fromarray(self._pixels[int(image)]))
        return content if size < 0 else content[:size]
