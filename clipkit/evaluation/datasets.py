"""DATA of the evaluation commands: which of the known layouts a path holds.

classification   folder with labels.csv (or the CSV itself) · CLIP_benchmark WebDataset folder ·
                 ImageFolder root/[split/]<class>/<image> · idx files of the MNIST family
retrieval        folder with captions.csv (or the CSV itself) · CLIP_benchmark WebDataset folder ·
                 folder of images with same-stem .txt files, one caption per line
"""

from __future__ import annotations

from pathlib import Path

from clipkit.data.tables import read_columns
from clipkit.evaluation import folders, shards, tables
from clipkit.evaluation.images import Images
from clipkit.evaluation.sets import ClassificationSet, RetrievalSet
from clipkit.types import ConfigError

DEFAULT_SPLIT = "test"


def _existing(data: str | Path) -> Path:
    path = Path(data).expanduser()
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder", "check the path of DATA")
    return path


def _is_table(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in (".csv", ".tsv")


def _unknown(path: Path, layouts: str) -> ConfigError:
    return ConfigError(f"{path}: not a layout this command reads", f"it reads {layouts}")


def _without_splits(path: Path, split: str) -> None:
    """Refuses a split that a layout without splits cannot have; "test" is what nobody asked for."""
    if split not in (DEFAULT_SPLIT, path.name):
        raise ConfigError(
            f"{path}: has no splits, and the split {split!r} was asked for",
            f"leave the split out to use all of it, or pass the folder that holds {split!r} as DATA",
        )


def _read_image_folder(path: Path, split: str) -> ClassificationSet:
    splits = folders.split_folders(path)
    if not splits:
        _without_splits(path, split)
        return folders.read_image_folder(path)
    if split not in splits:
        raise ConfigError(
            f"{path}: no split {split!r} (found: {', '.join(splits)})",
            f"pass --split {splits[-1]}, or {path / splits[-1]} as DATA",
        )
    if not folders.class_folders(path / split):
        raise _unknown(path / split, "one image folder per class")
    return folders.read_image_folder(path, split)


def _read_idx(path: Path, split: str) -> ClassificationSet:
    found = folders.find_idx(path)
    if list(found) == [""]:
        _without_splits(path, split)
        return folders.read_idx_pair(*found[""])
    if split not in found:
        raise ConfigError(f"{path}: no split {split!r} (found: {', '.join(found)})", "pass --split")
    return folders.read_idx_pair(*found[split])


def open_classification(data: str | Path, split: str = DEFAULT_SPLIT) -> ClassificationSet:
    """Returns the labelled images of `data`, in the order of their table, shards or sorted folders.

    split: the sub-folder to read of a CLIP_benchmark folder, or of an ImageFolder whose folders are all named
    like splits. Raises ConfigError when `data` does not exist, is no known layout or lacks the split,
    DataError when its content is damaged or contradicts itself.
    """
    path = _existing(data)
    if _is_table(path):
        _without_splits(path, split)
        return tables.read_labels(path)
    if path.is_dir():
        if (path / "labels.csv").is_file():
            _without_splits(path, split)
            return tables.read_labels(path / "labels.csv")
        if shards.is_benchmark(path, split):
            return shards.read_classification(path, split)
        if any(folders.IDX_NAME.search(entry.name) for entry in path.iterdir()):
            return _read_idx(path, split)
        if (path / "captions.csv").is_file():
            raise ConfigError(f"{path}: holds captions, not labels", f"run: clipkit retrieval MODEL {path}")
        if folders.class_folders(path):
            return _read_image_folder(path, split)
    raise _unknown(
        path,
        "a folder with labels.csv, a CLIP_benchmark folder (test/nshards.txt), or one image folder per class",
    )


def open_retrieval(data: str | Path, split: str = DEFAULT_SPLIT) -> RetrievalSet:
    """Returns the captioned images of `data`; split and errors as in `open_classification`."""
    path = _existing(data)
    if _is_table(path):
        _without_splits(path, split)
        return tables.read_captions(path)
    if path.is_dir():
        if (path / "captions.csv").is_file():
            _without_splits(path, split)
            return tables.read_captions(path / "captions.csv")
        if shards.is_benchmark(path, split):
            return shards.read_retrieval(path, split)
        if (path / "labels.csv").is_file():
            raise ConfigError(f"{path}: holds labels, not captions", f"run: clipkit zeroshot MODEL {path}")
        if folders.has_captions(path):
            _without_splits(path, split)
            return folders.read_captioned_folder(path)
    raise _unknown(
        path,
        "a folder with captions.csv, a CLIP_benchmark folder (test/nshards.txt), or images with .txt files",
    )


def open_images(data: str | Path, split: str = DEFAULT_SPLIT) -> Images:
    """Returns the images of `data`, of whichever of the two tasks it is; split and errors as above."""
    path = _existing(data)
    if _is_table(path):
        captioned = "caption" in read_columns(path)
        return (open_retrieval if captioned else open_classification)(path, split).images
    try:
        return open_retrieval(path, split).images
    except ConfigError:
        return open_classification(path, split).images
