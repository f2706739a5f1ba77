"""Evaluation data as plain folders: one per class, images with caption files, idx files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np

from clipkit.evaluation.images import SUFFIXES, ArrayImages, FileImages, read_idx
from clipkit.evaluation.prompts import WORDNET_ID, check_count, check_order, read_classnames, wordnet_names
from clipkit.evaluation.sets import ClassificationSet, RetrievalSet, retrieval_set
from clipkit.evaluation.tables import own_templates
from clipkit.types import DataError

# Image formats that would otherwise be overlooked in silence.
FOREIGN_SUFFIXES = (".tif", ".tiff", ".ppm", ".pgm", ".avif", ".heic", ".jp2", ".jfif")


# An idx file of images; what stands before it may name the split.
IDX_NAME = re.compile(r"images([-.])idx3-ubyte(?:\.gz)?$")
IDX_SPLITS = {"t10k": "test", "test": "test", "train": "train"}
# Names that folders of a layout with splits have, and classes do not.
SPLITS = ("train", "val", "valid", "validation", "test")


def _files(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yields the files below folder, links to folders followed unless they lead back to one `above`."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as found:
            seen = [entry for entry in found if not entry.name.startswith(".")]
        folders = [folder / entry.name for entry in seen if entry.is_dir()]
        yield from [folder / entry.name for entry in seen if entry.is_file()]
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be read ({error.strerror})", "check its permissions and its links"
        ) from error
    for below in folders:
        yield from _files(below, above | {real})


def _image_files(root: Path) -> list[Path]:
    """Returns the images below root, sorted by path; hidden files and folders are no data."""
    files = sorted(_files(root))
    for path in files:
        if path.suffix.lower() in FOREIGN_SUFFIXES:
            raise DataError(
                f"{path}: an image format that is not read here", f"convert it to {' '.join(SUFFIXES)}"
            )
    return [path for path in files if path.suffix.lower() in SUFFIXES]


def class_folders(root: Path) -> list[Path]:
    """Returns the sub-folders of root in sorted order, without hidden ones."""
    return sorted(
        (path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))),
        key=lambda path: path.name,
    )


def _folder_names(root: Path, split: str, folders: tuple[str, ...], wordnet: bool) -> tuple[str, ...]:
    """Returns class names: classnames.txt/.json of the split or root, else ImageNet's, else the folders'."""
    known = tuple(wordnet_names().get(folder, folder) if wordnet else folder for folder in folders)
    for place, name in product((root / split, root), ("classnames.txt", "classnames.json")):
        if (file := place / name).is_file():
            names = read_classnames(file, folders)
            check_count(names, len(folders), str(file), str(root))
            check_order(names, known, str(file))
            return names
    unknown = [folder for folder in known if WORDNET_ID.fullmatch(folder)]
    if unknown:
        raise DataError(
            f"{root}: {len(unknown)} WordNet ids are not among ImageNet's 1,000 (first: {unknown[0]})",
            "name the classes in classnames.json there: an object folder -> name",
        )
    return tuple(name if wordnet else name.replace("_", " ") for name in known)


def split_folders(root: Path) -> tuple[str, ...]:
    """Returns the splits of root/<split>/<class>/**/<image>; none where a folder has another name."""
    names = tuple(path.name for path in class_folders(root))
    return names if all(name in SPLITS for name in names) else ()


def read_image_folder(root: Path, split: str | None = None) -> ClassificationSet:
    """Returns the set of root/[split/]<class>/**/<image>: labels count the class folders in sorted order.

    Folders named by WordNet ids (n01440764) get open_clip's ImageNet class names. classnames.txt or
    classnames.json in the split, or in root, names them otherwise; a wrong number or order is a DataError.
    """
    classes = class_folders(root if split is None else root / split)
    folders = tuple(path.name for path in classes)
    wordnet = all(WORDNET_ID.fullmatch(folder) for folder in folders)
    files = [_image_files(path) for path in classes]
    for folder, found in zip(classes, files, strict=True):
        if not found:
            raise DataError(
                f"{folder}: a class folder without images", f"remove it, or add {'/'.join(SUFFIXES)} files"
            )
    return ClassificationSet(
        name=root.absolute().name,
        kind="imagefolder",
        source=str(root if split is None else root / split),
        images=FileImages([path for found in files for path in found]),
        labels=np.repeat(np.arange(len(files), dtype=np.int64), [len(found) for found in files]),
        names=_folder_names(root, split or "", folders, wordnet),
        templates=own_templates(root),
        folders=folders,
        wordnet=wordnet,
        split=split,
    )


def has_captions(root: Path) -> bool:
    """Returns whether any image below root has a .txt of the same stem."""
    return any(path.with_suffix(".txt").is_file() for path in _image_files(root))


def read_captioned_folder(root: Path) -> RetrievalSet:
    """Returns the set of images with same-stem .txt files, one caption per line; an image may have none."""
    files = _image_files(root)
    captions: list[list[str]] = []
    for path in files:
        text = path.with_suffix(".txt")
        try:
            captions.append(text.read_text(encoding="utf-8-sig").split("\n") if text.is_file() else [])
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{text}: cannot be read ({error})", "save it as UTF-8 text") from error
    # Only a line break at the very end is no caption of its own.
    trimmed = [texts[:-1] if texts and not texts[-1].strip() else texts for texts in captions]
    return retrieval_set(root.absolute().name, "imagefolder", str(root), FileImages(files), trimmed, None)


def find_idx(given: Path) -> dict[str, tuple[Path, Path]]:
    """Returns split -> (images, labels) of the idx files in a folder, or of one file of images.

    The split is told by the name (train-images-idx3-ubyte.gz, t10k-images-idx3-ubyte), "" where it tells
    none. DataError where the labels are missing or two files claim one split.
    """
    files = sorted(given.iterdir()) if given.is_dir() else [given]
    found: dict[str, tuple[Path, Path]] = {}
    for file in files:
        match = IDX_NAME.search(file.name)
        if match is None:
            continue
        prefix = file.name[: match.start()]
        stem = f"{prefix}labels{match[1]}idx1-ubyte"
        labels = next(
            (file.parent / f"{stem}{end}" for end in (".gz", "") if (file.parent / f"{stem}{end}").is_file()),
            None,
        )
        if labels is None:
            raise DataError(f"{given}: needs both {file.name} and {stem}", "add the missing file")
        split = next((name for word, name in IDX_SPLITS.items() if word in prefix.lower()), "")
        if split not in found:
            found[split] = file, labels
        elif found[split][1] != labels:
            raise DataError(
                f"{given}: {found[split][0].name} and {file.name} are one split",
                "give the file of images itself",
            )
    if not found:
        raise DataError(f"{given}: no file images-idx3-ubyte", "give the folder of the idx files")
    return found


def read_idx_pair(images_file: Path, labels_file: Path) -> ClassificationSet:
    """Returns the set of an idx file of images, one of labels, and classnames.txt beside them."""
    root = images_file.parent
    pixels, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if len(pixels) != len(labels):
        raise DataError(
            f"{images_file}: {len(pixels)} images, but {len(labels)} labels in {labels_file.name}",
            "fetch both files again",
        )
    names_file = root / "classnames.txt"
    return ClassificationSet(
        name=root.absolute().name,
        kind="idx",
        source=str(root),
        images=ArrayImages(images_file, pixels),
        labels=labels.astype(np.int64),
        names=read_classnames(names_file) if names_file.is_file() else None,
        templates=own_templates(root),
    )
