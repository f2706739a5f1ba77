"""Writers of small evaluation sets, one per layout, independent of the code that clipkit writes them with."""

from __future__ import annotations

import csv
import io
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def image_bytes(seed: int, fmt: str = "PNG") -> bytes:
    """Returns a small random image, encoded."""
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, fmt)
    return buffer.getvalue()


def write_csv(path: Path, header: str, rows: Iterable[Sequence[object]]) -> Path:
    """Writes a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows(rows)
    return path


def write_zip(path: Path, entries: dict[str, bytes]) -> Path:
    """Writes a zip file."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Writes a tar file with the members in the given order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def labelled_csv(root: Path, count: int, classes: Sequence[str], zipped: bool = True) -> Path:
    """Writes labels.csv, classnames.txt and the images; image i has label i % classes."""
    rows = [(f"images/{i}.png", i % len(classes), classes[i % len(classes)]) for i in range(count)]
    write_csv(root / "labels.csv", "filepath,label,class_name", rows)
    (root / "classnames.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    contents = {f"images/{i}.png": image_bytes(i) for i in range(count)}
    _store(root, contents, zipped)
    return root


def captioned_csv(root: Path, captions: Sequence[Sequence[str]], zipped: bool = True) -> Path:
    """Writes captions.csv and the images; image i has captions[i]."""
    rows = [(f"images/{i}.png", text) for i, texts in enumerate(captions) for text in texts]
    write_csv(root / "captions.csv", "filepath,caption", rows)
    _store(root, {f"images/{i}.png": image_bytes(i) for i in range(len(captions))}, zipped)
    return root


def _store(root: Path, contents: dict[str, bytes], zipped: bool) -> None:
    if zipped:
        write_zip(root / "images.zip", contents)
        return
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def benchmark_shards(
    root: Path, samples: Sequence[dict[str, bytes]], per_shard: int, split: str = "test", **texts: str
) -> Path:
    """Writes CLIP_benchmark shards; `texts`: classnames, templates, dataset_type as file contents."""
    files = {
        "classnames": "classnames.txt",
        "templates": "zeroshot_classification_templates.txt",
        "dataset_type": "dataset_type.txt",
    }
    starts = range(0, len(samples), per_shard)
    for shard, start in enumerate(starts):
        members = [
            (f"s{start + i:07d}.{extension}", content)
            for i, sample in enumerate(samples[start : start + per_shard])
            for extension, content in sorted(sample.items())
        ]
        write_tar(root / split / f"{shard}.tar", members)
    (root / split / "nshards.txt").write_text(f"{len(starts)}\n")
    for name, content in texts.items():
        (root / files[name]).write_text(content, encoding="utf-8")
    return root
