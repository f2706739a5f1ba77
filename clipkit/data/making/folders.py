"""Folders of images with captions in text files of the same stem, nested as they like."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipkit.data.making.collection import Entry, Found, Reading, refuse_splits
from clipkit.data.tables import ImageRoot
from clipkit.types import ConfigError, DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp")
TEXT_SUFFIX = ".txt"
OWN = ".clipkit-"  # what the names of our own files and folders begin with
_FIELDS = ("path",)


def walk_files(
    root: Path, above: frozenset[str] = frozenset(), hidden: Counter[str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Yields (folder relative to root, sorted names of its files), folders in sorted order.

    Hidden files and folders are left out (`hidden` counts images and folders among them), links to folders
    followed unless they lead back to one `above`. DataError for an unreadable folder.
    """
    stack = [("", above)]
    while stack:
        relative, above = stack.pop()
        folder = root / relative
        real = os.path.realpath(folder)
        if real in above:
            continue
        try:
            with os.scandir(folder) as found:
                listed = list(found)
            if hidden is not None:
                hidden.update(filter(None, map(_hidden_kind, listed)))
            seen = [entry for entry in listed if not entry.name.startswith(".")]
            below = sorted((entry.name for entry in seen if entry.is_dir()), reverse=True)
            files = sorted(entry.name for entry in seen if entry.is_file())
        except OSError as error:
            raise DataError(
                f"{folder}: cannot be read ({error.strerror})", "check its permissions and its links"
            ) from error
        if files:
            yield relative, files
        stack += [(os.path.join(relative, name), above | {real}) for name in below]


def _hidden_kind(entry: os.DirEntry[str]) -> str:
    """What a user may miss of an entry that is passed over; our own files and settings are not among it."""
    if not entry.name.startswith(".") or entry.name.startswith(OWN):
        return ""
    if is_image(entry.name):
        return "hidden images"
    return "hidden folders" if entry.is_dir() else ""


def is_image(name: str) -> bool:
    """Returns whether a file is an image by its extension."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def holds_pairs(root: Path) -> bool:
    """Returns whether any image below root has a .txt of the same stem."""
    return any(text is not None for _, _, text in _stems(root))


def _stems(root: Path, hidden: Counter[str] | None = None) -> Iterator[tuple[list[str], str, str | None]]:
    """Yields (images of one stem, stem, its text file) of every stem that has an image, in order."""
    for relative, files in walk_files(root, hidden=hidden):
        images: dict[str, list[str]] = {}
        texts: dict[str, str] = {}
        for name in files:
            stem, suffix = os.path.splitext(name)
            if is_image(name):
                images.setdefault(stem, []).append(os.path.join(relative, name))
            elif suffix.lower() == TEXT_SUFFIX:
                texts[stem] = os.path.join(relative, name)
        for stem, names in images.items():
            yield names, os.path.join(relative, stem), texts.get(stem)


def read_pairs(root: Path, reading: Reading) -> Found:
    """Returns the images below a folder with the lines of their text files as captions."""
    refuse_splits(root, reading)
    kept = _FIELDS if reading.keep is None else reading.keep
    unknown = [name for name in kept if name not in _FIELDS]
    if unknown or reading.captions or reading.image_key or reading.images:
        raise ConfigError(
            f"{root}: same-stem pairs have no columns, and their images lie beside the texts",
            "leave --image-key, --caption-key and --images out; --keep path stores the names",
        )
    hidden: Counter[str] = Counter()

    def entries() -> Iterator[Entry]:
        hidden.clear()
        for number, (images, stem, text) in enumerate(_stems(root, hidden)):
            fields = {"path": images[0]} if kept else {}
            problem = None
            if len(images) > 1:
                problem = "several images of one stem", ", ".join(map(os.path.basename, images))
            elif text is None:
                problem = "no caption file", f"{stem}{TEXT_SUFFIX}"
            # The captions are read by the worker that reads the image.
            yield Entry(number, images[0], (text or "",), None, fields, problem)

    used = "a caption per line of each text file"
    return Found("pairs", PairFiles(root), entries, _FIELDS, kept, used, passed_over=hidden)


@dataclass
class PairFiles(ImageRoot):
    """Images below a folder; the caption of an entry is the name of its text file."""

    def captions(self, entry: Entry) -> tuple[str, ...]:
        """Returns the lines of the text file of an entry; OSError or UnicodeDecodeError."""
        text = (self.path / entry.captions[0]).read_bytes().decode("utf-8-sig")
        return tuple(line for line in text.split("\n") if line.strip())
