"""Data sets of the Hugging Face library: a folder of save_to_disk, or a name on the hub."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipkit.data.making.annotations import choose_splits
from clipkit.data.making.collection import Entry, Found, Images, Reading
from clipkit.data.making.tables import (
    caption_texts,
    checked,
    columns_used,
    kept_columns,
    with_templates,
)
from clipkit.data.tables import CAPTION_COLUMNS, find_root, jsonable
from clipkit.types import ConfigError, DataError

_NOT_FOR_JSON = ("Image(", "Audio(", "Video(", "Pdf(", "binary")  # in the words of the library's features


def is_saved(folder: Path) -> bool:
    """Returns whether save_to_disk wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def read_huggingface(path: Path, reading: Reading) -> Found:
    """Returns the rows of a data set; class labels give captions by template where no column has captions.

    The rows stay in the library's memory-mapped files. A name on the hub is downloaded into its cache.
    """
    splits = _open(str(path))
    chosen = choose_splits(str(path), tuple(splits), reading)
    if len(chosen) > 1:
        raise ConfigError(f"{path}: read one split at a time", "make shards of each split")
    data = splits[chosen[0]]
    features, columns = data.features, data.column_names
    image = reading.image_key or next(
        (name for name in columns if type(features[name]).__name__ == "Image"), None
    )
    captions = reading.captions or tuple(name for name in CAPTION_COLUMNS if name in columns)[:1]
    label = next((name for name in columns if hasattr(features[name], "names")), None)
    if image is None or (not captions and label is None):
        what = "images" if image is None else "captions or class labels"
        raise DataError(
            f"{path}: no column of {what} is known (found: {', '.join(columns)})",
            "name the columns with --image-key and --caption-key",
        )
    for name in (image, *captions, *(reading.keep or ())):
        if name not in columns:
            raise DataError(
                f"{path}: no column '{name}' (found: {', '.join(columns)})",
                "name the columns with --image-key, --caption-key and --keep",
            )
    labelled = label is not None and (reading.labels_first or not captions)
    names = tuple(map(str, features[label].names)) if labelled else None
    inside = str(features[image].dtype if hasattr(features[image], "dtype") else "") != "string"
    pictures = {name for name in columns if any(kind in str(features[name]) for kind in _NOT_FOR_JSON)}
    keep = kept_columns(columns, image, captions, reading, pictures)

    def entries() -> Iterator[Entry]:
        wanted = [*dict.fromkeys((*captions, *keep, *([label] if labelled else [])))]
        if not inside:
            wanted.append(image)
        for number, row in enumerate(data.select_columns(wanted)):
            kept = {name: jsonable(row[name]) for name in keep}
            name = str(number) if inside else str(row[image] or "")
            entry = Entry(number, name, caption_texts(row[key] for key in captions), None, kept)
            if names is not None:
                entry = with_templates(entry, row[label], names, reading.templates)
            yield entry if inside else checked(entry)

    images: Images = HubImages(str(path), chosen[0], image)
    if not inside:
        images = find_root(path / "table", reading.images, next(entries()).image)
    used = f"images in column {image}, classes in {label}"
    used = columns_used(image, captions, keep) if names is None else used
    return Found("huggingface", images, entries, tuple(columns), keep, used, classnames=names)


def _library() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            "data sets of Hugging Face need the package datasets", "install clipkit[hf]"
        ) from error


def _open(path: str) -> dict[str, Any]:
    """Returns the data set's splits by name; a set without splits under an empty name."""
    library = _library()
    try:
        found = library.load_from_disk(path) if Path(path).is_dir() else library.load_dataset(path)
    except Exception as error:  # the library raises many kinds, of several packages
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(
            f"{path}: no data set that can be loaded ({detail})",
            "give a folder written by save_to_disk, or a name on the hub",
        ) from error
    return dict(found) if isinstance(found, dict) else {"": found}


@dataclass
class HubImages:
    """Images in a column of a data set; an image is known by its row."""

    source: str
    split: str
    column: str
    _data: Any = field(default=None, init=False, repr=False)

    def __getstate__(self) -> dict[str, object]:
        return {"source": self.source, "split": self.split, "column": self.column, "_data": None}

    def read(self, image: str, size: int = -1) -> bytes:
        """Returns the first `size` bytes of an image (all by default); OSError or ValueError."""
        if self._data is None:
            library = _library()
            data = _open(self.source)[self.split].select_columns([self.column])
            if type(data.features[self.column]).__name__ == "Image":
                data = data.cast_column(self.column, library.Image(decode=False))
            self._data = data
        value = self._data[int(image)][self.column]
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None and isinstance(value, dict) and value.get("path"):
            content = Path(value["path"]).read_bytes()
        if not isinstance(content, bytes):
            raise ValueError("the cell holds no bytes")
        return content if size < 0 else content[:size]
