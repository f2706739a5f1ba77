"""Small inputs, written with the standard library and Pillow alone, and independent readers."""

from __future__ import annotations

import csv
import io
import json
import random
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from PIL import Image

# Captions in many scripts, with what tar and text readers trip over.
CAPTIONS = (
    "a red square", "ein rotes Quadrat über dem Tisch", "красный квадрат", "红色的正方形", "赤い四角",
    "مربع أحمر", "ריבוע אדום", "लाल वर्ग", "빨간 사각형", "สี่เหลี่ยมสีแดง", "κόκκινο τετράγωνο",
    "square 🟥 👩‍👩‍👧", 'with "quotes", commas; and | bars', "-leading dash", "line\nbreak", "tab\there",
    "  spaces   around  ", "next\x85line and \u2028 separator",
)  # fmt: skip


def picture(number: int, size: tuple[int, int] = (12, 8), name: str = "JPEG", **options: Any) -> bytes:
    """Returns an encoded image that differs from that of every other number."""
    generator = random.Random(number)
    image = Image.new("RGB", size, tuple(generator.randrange(256) for _ in range(3)))
    image.putpixel((0, 0), (number % 256, number // 256 % 256, 99))
    stream = io.BytesIO()
    image.save(stream, name, **options)
    return stream.getvalue()


def write_images(folder: Path, names: list[str]) -> dict[str, bytes]:
    """Writes picture(n) under the n-th name and returns the bytes by name."""
    contents = {name: picture(number) for number, name in enumerate(names)}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return contents


def write_csv(path: Path, header: list[str], rows: list[list[Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, delimiter=delimiter).writerows([header, *rows])
    return path


def write_zip(path: Path, contents: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def table(folder: Path, number: int = 20) -> Path:
    """Writes a table with captions in every script, images below a folder beside it."""
    names = [f"photos/{row:03d} ä.jpg" for row in range(number)]
    write_images(folder, names)
    rows = [[name, CAPTIONS[row % len(CAPTIONS)] + f" {row}"] for row, name in enumerate(names)]
    return write_csv(folder / "pairs.csv", ["filepath", "caption"], rows)


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Returns key -> extension -> bytes of all shards in a folder, by tarfile alone."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                stream = archive.extractfile(member)
                assert stream is not None
                assert extension not in found.setdefault(key, {})
                found[key][extension] = stream.read()
    return found


def rejects(folder: Path) -> list[tuple[int, str]]:
    """Returns (row, reason) of every reject that a job wrote down."""
    lines = (folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    return [(entry["row"], entry["reason"]) for entry in map(json.loads, lines)]


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of every visible file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
