"""The bytes of one image on their way into a shard: unchanged, or turned, resized and encoded again."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from clipkit.data.sample import MAX_ASPECT, MAX_PIXELS, Unusable, decode_image
from clipkit.data.shards import image_extension
from clipkit.types import ConfigError

MAX_IMAGE_BYTES = 1 << 28
RESIZE_MODES = ("shorter", "longer", "keep")
FORMATS = ("keep", "jpg", "png", "webp")
DEFAULT_QUALITY = 95
_ORIENTATION = 0x0112
# EXIF orientation -> what turns the stored pixels upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FOREIGN = {
    b"II*\x00": "TIFF", b"MM\x00*": "TIFF", b"\x00\x00\x00\x0cJXL ": "JPEG XL", b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cjP  ": "JPEG 2000", b"<svg": "SVG", b"<?xml": "SVG", b"%PDF": "PDF",
}  # fmt: skip
_HEADER_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError,
    OverflowError, MemoryError, struct.error, Image.DecompressionBombError,
)  # fmt: skip


class Prepared(NamedTuple):
    """Bytes for the shard.

    rotated  the EXIF data asks for a rotation that is not in the pixels
    encoded  the pixels were encoded again
    """

    content: bytes
    extension: str
    rotated: bool
    encoded: bool


@dataclass(frozen=True)
class ImageRules:
    """What becomes of the bytes of an image; by default they are copied.

    resize   length in pixels of the shorter or longer side; smaller images stay as they are unless `enlarge`
    format   keep, jpg, png or webp; keep makes png of gif and bmp when they are encoded again
    quality  of jpg and webp, 1 to 100
    """

    resize: int | None = None
    resize_mode: str = "shorter"
    enlarge: bool = False
    format: str = "keep"
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.resize_mode not in RESIZE_MODES or self.format not in FORMATS:
            raise ConfigError(
                f"no resize mode {self.resize_mode!r} or no format {self.format!r}",
                f"modes are {', '.join(RESIZE_MODES)}; formats {', '.join(FORMATS)}",
            )
        if self.enlarge and self.resize is None:
            raise ConfigError("images are enlarged only to a length", "give --resize as well")
        if self.quality is not None and self.format == "png":
            raise ConfigError("png has no quality: it loses nothing", "leave --quality or --format png out")

    @property
    def changes(self) -> bool:
        """Whether any image may be encoded again."""
        return self.resize is not None or self.format != "keep" or self.quality is not None

    def description(self) -> dict[str, Any]:
        """Returns what the bytes depend on, JSON-able."""
        from PIL import __version__

        return {**vars(self), "pillow": __version__} if self.changes else {}

    def prepare(self, content: bytes) -> Prepared:
        """Returns the bytes to store. Raises Unusable with the reason."""
        extension, size, turn = inspect(content)
        target = self._target(size if turn not in (5, 6, 7, 8) else size[::-1])
        suffix = self._suffix(extension)
        if not self.changes or (
            target is None and suffix == extension and self.quality is None and turn not in _TURNS
        ):
            return Prepared(content, extension, turn in _TURNS, False)
        image = decode_image(content)
        if turn in _TURNS:
            image = image.transpose(_TURNS[turn])
        if target is not None:
            image = image.resize(target, Image.Resampling.LANCZOS)
        return Prepared(_encode(image, suffix, self.quality or DEFAULT_QUALITY), suffix, False, True)

    def _suffix(self, extension: str) -> str:
        if self.format != "keep":
            return self.format
        return extension if not self.changes or extension in FORMATS else "png"

    def _target(self, size: tuple[int, ...]) -> tuple[int, int] | None:
        if self.resize is None or self.resize_mode == "keep":
            return None
        side = min(size) if self.resize_mode == "shorter" else max(size)
        if side == self.resize or (side < self.resize and not self.enlarge):
            return None
        width, height = (max(1, round(length * self.resize / side)) for length in size)
        return width, height


UNCHANGED = ImageRules()


def inspect(content: bytes) -> tuple[str, tuple[int, int], int]:
    """Returns extension by content, size (width, height) and EXIF orientation from the header of an image.

    Raises Unusable for what training would refuse by the header alone.
    """
    if not content:
        raise Unusable("empty image", "0 bytes")
    extension = image_extension(content)
    if extension is None:
        foreign = next((name for start, name in _FOREIGN.items() if content.startswith(start)), None)
        if foreign is None and content[4:8] == b"ftyp":
            foreign = "AVIF or HEIC"
        if foreign is not None:
            raise Unusable("image format not read", f"{foreign}; convert it to JPEG, PNG or WebP")
        raise Unusable("not an image", f"starts with {content[:8]!r}")
    if len(content) > MAX_IMAGE_BYTES:
        raise Unusable("image too large", f"more than {MAX_IMAGE_BYTES >> 20} MiB")
    # Pillow's own limit would warn or raise at open, before ours is compared.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP", "GIF", "BMP")) as image:
            size = image.size
            turn = _orientation(image)
    except _HEADER_ERRORS as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())
        raise Unusable("bad image", detail[:200]) from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    if size[0] * size[1] > MAX_PIXELS:
        raise Unusable("too many pixels", f"{size[0]} x {size[1]} is more than {MAX_PIXELS}")
    if min(size) < 1 or max(size) > MAX_ASPECT * min(size):
        raise Unusable("extreme aspect ratio", f"{size[0]} x {size[1]}")
    return extension, size, turn


def _orientation(image: Image.Image) -> int:
    # Only where the header has it: a PNG keeps EXIF data behind its pixels, and looking decodes it all.
    if "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _HEADER_ERRORS:
        return 1  # damaged EXIF data does not make the pixels unusable


def _encode(image: Image.Image, suffix: str, quality: int) -> bytes:
    # A copy without the notes of the source: PNG would store its colour profile and texts.
    plain = image.copy()
    plain.info = {}
    stream = io.BytesIO()
    if suffix == "jpg":
        plain.save(stream, "JPEG", quality=quality, optimize=True)
    elif suffix == "webp":
        plain.save(stream, "WEBP", quality=quality, method=4)
    else:
        plain.save(stream, "PNG", optimize=False)
    return stream.getvalue()
