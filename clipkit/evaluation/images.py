"""Where evaluation images lie: files, entries of a zip, members of tars, one idx array. All are picklable.

Whatever cannot be read is a DataError naming the image: an evaluation never drops or replaces one.
"""

from __future__ import annotations

import gzip
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from clipkit.data.sample import Unusable, decode_image
from clipkit.types import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


class Images(Protocol):
    """A sequence of images: how many, what they are called, and each of them decoded."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str:
        """Returns how a message calls image `index`."""
        ...

    def load(self, index: int) -> Image.Image:
        """Returns the decoded image; raises DataError naming it."""
        ...


def unreadable(name: str, reason: object) -> DataError:
    """Returns the error for an image that cannot be read."""
    detail = " ".join(str(reason).split()) or type(reason).__name__
    return DataError(
        f"{name}: not a readable image ({detail})",
        "repair, replace or remove it: an evaluation leaves nothing out by itself",
    )


def _decode(content: bytes, name: str) -> Image.Image:
    try:
        return decode_image(content)
    except Unusable as error:
        raise unreadable(name, f"{error.reason}: {error.detail}") from error


@dataclass(frozen=True)
class FileImages:
    """Image files, by path."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Returns the path."""
        return str(self.paths[index])

    def load(self, index: int) -> Image.Image:
        """Returns the decoded file."""
        try:
            content = self.paths[index].read_bytes()
        except OSError as error:
            raise unreadable(self.name(index), error.strerror or error) from error
        return _decode(content, self.name(index))


@dataclass
class ZipImages:
    """Entries of one zip file. A handle belongs to one process: forked ones would share its position."""

    path: Path
    entries: Sequence[str]
    _handle: tuple[int, zipfile.ZipFile] | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handle": None}

    def name(self, index: int) -> str:
        """Returns zip path and entry."""
        return f"{self.path}:{self.entries[index]}"

    def load(self, index: int) -> Image.Image:
        """Returns the decoded entry."""
        try:
            if self._handle is None or self._handle[0] != os.getpid():
                self._handle = os.getpid(), zipfile.ZipFile(self.path)
            content = self._handle[1].read(self.entries[index])
        except (OSError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise unreadable(self.name(index), error) from error
        return _decode(content, self.name(index))


@dataclass(frozen=True)
class TarImages:
    """Members of tar files: `shards[shard[i]]`, bytes `offset[i] .. offset[i] + size[i]`."""

    shards: Sequence[Path]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    members: Sequence[str]

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        """Returns tar path and member."""
        return f"{self.shards[self.shard[index]]}:{self.members[index]}"

    def load(self, index: int) -> Image.Image:
        """Returns the decoded member."""
        try:
            with open(self.shards[self.shard[index]], "rb") as file:
                file.seek(int(self.offset[index]))
                content = file.read(int(self.size[index]))
        except OSError as error:
            raise unreadable(self.name(index), error.strerror or error) from error
        return _decode(content, self.name(index))


@dataclass(frozen=True)
class ArrayImages:
    """Grey images of one array, uint8 (N, H, V): the idx files of the MNIST family."""

    path: Path
    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        """Returns path and number."""
        return f"{self.path}:{index}"

    def load(self, index: int) -> Image.Image:
        """Returns the image in RGB."""
        return Image.fromarray(self.pixels[index]).convert("RGB")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Returns the uint8 array of a (gzipped) idx file; raises DataError when header and content disagree."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: {error}", "fetch the file again: it is damaged or incomplete") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(
            f"{path}: not an idx file of unsigned bytes in {dimensions} dimensions",
            "images-idx3-ubyte holds the images, labels-idx1-ubyte the labels: check for swapped files",
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != int(np.prod(shape)):
        raise DataError(
            f"{path}: header promises shape {shape}, content has {len(content) - header} bytes",
            "fetch the file again: it is damaged or incomplete",
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)
