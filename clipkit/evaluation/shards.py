"""The CLIP_benchmark WebDataset layout, read once at the headers; image bytes stay in their tars.

    root/classnames.txt, zeroshot_classification_templates.txt, dataset_type.txt ("retrieval" | "multilabel")
    root/<split>/nshards.txt, root/<split>/0.tar 1.tar ...
    members KEY.webp|png|jpg|jpeg (the first of these that exists) and KEY.cls (label) or KEY.txt (captions)

Source: CLIP_benchmark clip_benchmark/datasets/builder.py. Captions are split at line feeds only: the original
uses str.splitlines, which also cuts at U+2028, U+0085 and other characters inside a caption.
"""

from __future__ import annotations

import os
from codecs import BOM_UTF8
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clipkit.data.tar_format import split_name, walk
from clipkit.evaluation.images import TarImages
from clipkit.evaluation.prompts import read_classnames
from clipkit.evaluation.sets import ClassificationSet, RetrievalSet, retrieval_set
from clipkit.evaluation.tables import own_templates
from clipkit.types import ConfigError, DataError

IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")
ANNOTATIONS = ("cls", "txt")


@dataclass
class _Sample:
    """One key: where its image members lie, and its small members in full."""

    shard: int
    places: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)

    def members(self) -> str:
        return ", ".join([*self.places, *self.contents])


def _folders(path: Path, split: str) -> tuple[Path, Path]:
    """Returns (root, split folder); `path` may be either."""
    return (path.absolute().parent, path) if (path / "nshards.txt").is_file() else (path, path / split)


def is_benchmark(path: Path, split: str) -> bool:
    """Returns whether `path` looks like a CLIP_benchmark folder, or like one of its splits."""
    _, folder = _folders(path, split)
    if (folder / "nshards.txt").is_file() or (folder / "0.tar").is_file():
        return True
    others = sorted(found.parent.name for found in path.glob("*/nshards.txt"))
    if others:
        raise ConfigError(
            f"{path}: no split {split!r} (found: {', '.join(others)})", f"pass {path / others[0]} as DATA"
        )
    return False


def _shard_paths(folder: Path) -> list[Path]:
    counter = folder / "nshards.txt"
    try:
        number = int(counter.read_text(encoding="utf-8-sig").strip())
    except FileNotFoundError as error:
        raise DataError(f"{counter}: missing", "write the number of shards into it") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{counter}: holds no number", "write the number of shards into it") from error
    paths = [folder / f"{index}.tar" for index in range(number)]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: missing shard ({counter.name} says {number})", "fetch it again")
    if (folder / f"{number}.tar").is_file():
        raise DataError(
            f"{folder}: there is a {number}.tar, but {counter.name} says {number}", f"correct {counter}"
        )
    return paths


def _ignore(header: bytes) -> None:
    """Evaluation keeps no fingerprint of the headers."""


def _read_shard(number: int, path: Path, samples: dict[str, _Sample]) -> None:
    """Adds the samples of one tar: labels and captions in full, of every other member its place."""
    with path.open("rb") as file:

        def read(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        end = os.fstat(file.fileno()).st_size
        for member in list(walk(read, 0, end, str(path), whole=True, on_header=_ignore)):
            parts = split_name(member.name)
            if parts is None:
                continue
            key, extension = parts
            sample = samples.setdefault(key, _Sample(number))
            if sample.shard != number or extension in sample.places or extension in sample.contents:
                raise DataError(
                    f"{path}:{member.name}: the key {key!r} occurs twice",
                    "give every sample its own key",
                )
            if extension in ANNOTATIONS:
                sample.contents[extension] = read(member.data, member.size)
            else:
                sample.places[extension] = (member.data, member.size, member.name)


def _read_samples(paths: list[Path]) -> dict[str, _Sample]:
    samples: dict[str, _Sample] = {}
    for number, path in enumerate(paths):
        try:
            _read_shard(number, path, samples)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})", "check the storage") from error
    return samples


def _images(paths: list[Path], samples: Mapping[str, _Sample]) -> TarImages:
    shard, offset, size, names = [], [], [], []
    for key, sample in samples.items():
        extension = next((found for found in IMAGE_EXTENSIONS if found in sample.places), None)
        if extension is None:
            raise DataError(
                f"{paths[sample.shard]}: sample {key!r} has no image member (found: {sample.members()})",
                f"an image is called KEY.{'|'.join(IMAGE_EXTENSIONS)}, and KEY holds no dot",
            )
        place = sample.places[extension]
        shard.append(sample.shard)
        offset.append(place[0])
        size.append(place[1])
        names.append(place[2])
    return TarImages(paths, np.array(shard), np.array(offset), np.array(size), names)


def _dataset_type(root: Path) -> str:
    file = root / "dataset_type.txt"
    return file.read_text(encoding="utf-8-sig").strip().lower() if file.is_file() else "classification"


def _label(content: bytes | None, where: str) -> int:
    if content is None:
        raise DataError(f"{where} has no member .cls", "every sample needs KEY.cls, a number from 0")
    try:
        return int(content.removeprefix(BOM_UTF8).decode("ascii").strip())
    except (UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{where}: .cls holds no number", "write the class number, counted from 0") from error


def read_classification(path: Path, split: str) -> ClassificationSet:
    """Returns the labelled images of a CLIP_benchmark folder, in shard order.

    Raises ConfigError for a retrieval or multi-label set, DataError for damaged or incomplete shards.
    """
    root, folder = _folders(path, split)
    kind = _dataset_type(root)
    if kind == "retrieval":
        raise ConfigError(f"{root}: a retrieval set", f"run: clipkit retrieval MODEL {path}")
    if kind == "multilabel":
        raise ConfigError(f"{root}: a multi-label set", "zero-shot classification needs one label per image")
    paths = _shard_paths(folder)
    samples = _read_samples(paths)
    labels = [
        _label(sample.contents.get("cls"), f"{paths[sample.shard]}: sample {key!r}")
        for key, sample in samples.items()
    ]
    names_file = root / "classnames.txt"
    return ClassificationSet(
        name=root.absolute().name,
        kind="webdataset",
        source=str(path),
        images=_images(paths, samples),
        labels=np.array(labels, dtype=np.int64),
        names=read_classnames(names_file) if names_file.is_file() else None,
        templates=own_templates(root),
        split=folder.name,
    )


def _captions(content: bytes | None, where: str) -> list[str]:
    try:
        lines = (content or b"").decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: .txt is not UTF-8 ({error})", "write captions as UTF-8") from error
    return lines[:-1] if not lines[-1].strip() else lines


def read_retrieval(path: Path, split: str) -> RetrievalSet:
    """Returns the captioned images of a CLIP_benchmark folder; errors as in `read_classification`."""
    root, folder = _folders(path, split)
    kind = _dataset_type(root)
    paths = _shard_paths(folder)
    samples = _read_samples(paths)
    if kind != "retrieval" and not any("txt" in sample.contents for sample in samples.values()):
        raise ConfigError(f"{root}: a classification set", f"run: clipkit zeroshot MODEL {path}")
    captions = [
        _captions(sample.contents.get("txt"), f"{paths[sample.shard]}: sample {key!r}")
        for key, sample in samples.items()
    ]
    images = _images(paths, samples)
    return retrieval_set(root.absolute().name, "webdataset", str(path), images, captions, folder.name)
