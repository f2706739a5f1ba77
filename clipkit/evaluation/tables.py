"""labels.csv and captions.csv with their images: files beside the table, or entries of images.zip there."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from clipkit.data.tables import ARCHIVE, read_rows
from clipkit.evaluation.images import FileImages, Images, ZipImages
from clipkit.evaluation.prompts import read_classnames, read_templates
from clipkit.evaluation.sets import ClassificationSet, RetrievalSet, retrieval_set
from clipkit.types import ConfigError, DataError

HEADER = "the first line must name the columns {}"
TEMPLATES = ("templates.txt", "zeroshot_classification_templates.txt")


def _zip_entries(archive: Path, paths: Sequence[str], table: Path) -> list[str]:
    try:
        with zipfile.ZipFile(archive) as opened:
            known = set(opened.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive}: not a readable zip file ({error})", "fetch the file again") from error
    entries = []
    for path in paths:
        plain = str(PurePosixPath(path))
        entry = plain if plain in known else plain.removeprefix("images/")
        if entry not in known:
            raise DataError(
                f"{table}: {path!r} is not in {archive.name}", "make the table and the zip file agree"
            )
        entries.append(entry)
    return entries


def find_images(table: Path, paths: Sequence[str]) -> Images:
    """Returns the images named by a table: files relative to its folder, or else entries of images.zip there.

    Raises DataError naming the first image that does not exist.
    """
    root, archive = table.parent, table.parent / ARCHIVE
    if archive.is_file() and not (root / paths[0]).is_file():
        return ZipImages(archive, _zip_entries(archive, paths, table))
    files = [root / path for path in paths]
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise DataError(
            f"{table}: {len(missing)} of {len(files)} images do not exist (first: {missing[0]})",
            f"paths are relative to {root}, or entries of {ARCHIVE} there",
        )
    return FileImages(files)


def _name(table: Path) -> str:
    parent = table.absolute().parent.name
    return parent if table.stem in ("labels", "captions") else f"{parent}/{table.stem}"


def own_templates(root: Path) -> tuple[str, ...] | None:
    """Returns the templates that lie beside the data, or None."""
    for name in TEMPLATES:
        if (root / name).is_file():
            templates = read_templates(root / name)
            if isinstance(templates, dict):
                raise ConfigError(f"{root / name}: not a list of templates", "write one template per line")
            return templates
    return None


def _label(text: str, names: Sequence[str] | None, table: Path, number: int) -> int:
    if text.strip().isdecimal():
        return int(text)
    if names is not None and text.strip() in names:
        return names.index(text.strip())
    raise DataError(
        f"{table}: row {number}: label {text!r} is neither a number from 0 nor a class name",
        "number the classes from 0 in the order of classnames.txt",
    )


def _names_from_column(table: Path, labels: list[int], column: list[str]) -> tuple[str, ...]:
    """Returns the class names that the column `class_name` implies, where there is no classnames.txt."""
    found: dict[int, str] = {}
    for number, (label, name) in enumerate(zip(labels, column, strict=True), 2):
        if found.setdefault(label, name) != name:
            raise DataError(
                f"{table}: row {number}: label {label} is called {name!r} and {found[label]!r}",
                "give every label one class_name",
            )
    gap = next((label for label in range(max(found) + 1) if label not in found), None)
    if gap is not None:
        raise DataError(
            f"{table}: no row has label {gap}: its class has no name",
            "put classnames.txt beside the table",
        )
    return tuple(found[label] for label in range(len(found)))


def read_labels(table: Path) -> ClassificationSet:
    """Returns the set of a CSV with `filepath,label[,class_name]` and classnames.txt beside it.

    label is a number from 0 (or a class name). Where there is a column class_name it must agree with
    classnames.txt, which catches a file in another order; without the file it gives the names.
    """
    rows = read_rows(table, ("filepath", "label"), HEADER.format("filepath,label"))
    root = table.parent
    names_file = root / "classnames.txt"
    names = read_classnames(names_file) if names_file.is_file() else None
    labels = [_label(row["label"], names, table, number) for number, row in enumerate(rows, 2)]
    if "class_name" in rows[0]:
        column = [row["class_name"] or "" for row in rows]
        if names is None:
            names = _names_from_column(table, labels, column)
        for number, (label, name) in enumerate(zip(labels, column, strict=True), 2):
            if label < len(names) and name.strip() != names[label]:
                raise DataError(
                    f"{names_file}: class {label} is {names[label]!r}, "
                    f"but {table.name} row {number} calls it {name!r}",
                    "put the class names into the order of the labels",
                )
    return ClassificationSet(
        name=_name(table),
        kind="csv",
        source=str(table),
        images=find_images(table, [row["filepath"] for row in rows]),
        labels=np.array(labels, dtype=np.int64),
        names=names,
        templates=own_templates(root),
    )


def read_captions(table: Path) -> RetrievalSet:
    """Returns the set of a CSV `filepath,caption`: a row per caption, images by first appearance."""
    captions: dict[str, list[str]] = {}
    for row in read_rows(table, ("filepath", "caption"), HEADER.format("filepath,caption")):
        captions.setdefault(row["filepath"], []).append(row["caption"])
    images = find_images(table, list(captions))
    return retrieval_set(_name(table), "csv", str(table), images, list(captions.values()), None)
