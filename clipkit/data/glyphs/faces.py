"""The twelve DejaVu faces that matplotlib ships, drawn with Pillow, and random draws that are the same
everywhere.

Made data: it shows that the machine works, not that a model is good.
"""

from __future__ import annotations

import functools
import hashlib
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageDraw, ImageFont

Item = TypeVar("Item")

FACES = tuple(
    f"DejaVu{family}{style}"
    for family, slanted in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
    for style in ("", "-Bold", f"-{slanted}", f"-Bold{slanted}")
)
HELD_OUT_FACE = "DejaVuSerif-Italic"
TRAIN_FACES = tuple(face for face in FACES if face != HELD_OUT_FACE)

# Hair-thin strokes of small pictograms would be too pale to show their colour.
_FIRM = [min(255, ink * 8 // 5) for ink in range(256)]


class Draws:
    """Whole numbers derived from `tags` by BLAKE2b: the same on every platform and in every process."""

    def __init__(self, *tags: str | int) -> None:
        self._tags = repr(tags).encode()
        self._block = b""
        self._used = self._count = 0

    def below(self, bound: int) -> int:
        """Returns a number in 0..bound-1; the bias is below bound / 2**32."""
        if self._used == len(self._block):
            self._block = hashlib.blake2b(b"%d %b" % (self._count, self._tags)).digest()
            self._count += 1
            self._used = 0
        word = int.from_bytes(self._block[self._used : self._used + 4], "little")
        self._used += 4
        return word * bound >> 32

    def between(self, low: int, high: int) -> int:
        """Returns a number in low..high, both included."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence[Item]) -> Item:
        """Returns one of `items`."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[Item], count: int) -> list[Item]:
        """Returns `count` different entries of `items`, in random order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]


def face_path(face: str) -> Path:
    """Returns the font file of `face` inside the installed matplotlib."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


@functools.cache
def coverage(face: str) -> frozenset[int]:
    """Returns the code points for which `face` has a glyph of its own (its character map)."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(face_path(face))).get_charmap())


@functools.cache
def font(face: str, pixels: float) -> ImageFont.FreeTypeFont:
    """Returns `face` at an em of `pixels`, laid out without ligatures or shaping."""
    return ImageFont.truetype(str(face_path(face)), pixels, layout_engine=ImageFont.Layout.BASIC)


def draw_character(face: str, pixels: float, character: str) -> Image.Image:
    """Returns the character as an L image, ink 255, cropped to its ink; a blank character gives a 0 x 0
    image.
    """
    used = font(face, pixels)
    left, top, right, bottom = used.getbbox(character)
    margin = 2 + int(pixels) // 8
    canvas = Image.new("L", (int(right - left) + 2 * margin, int(bottom - top) + 2 * margin))
    ImageDraw.Draw(canvas).text((margin - left, margin - top), character, fill=255, font=used)
    return canvas.crop(canvas.getbbox() or (0, 0, 0, 0))


@functools.cache
def glyph_mask(face: str, character: str, extent: int) -> Image.Image:
    """Returns the ink of one character as an L image whose longer side is about `extent` pixels."""
    scale = extent / max(draw_character(face, 100.0, character).size)
    mask = draw_character(face, round(100.0 * scale, 2), character)
    return mask.point(_FIRM)


def encode_png(image: Image.Image) -> bytes:
    """Returns an RGB or L image as PNG bytes: no filter, zlib level 6, no further chunks.

    For flat drawings smaller than what Pillow writes and twice as fast; equal images give equal bytes with
    one zlib.
    """
    colour_type, row = {"RGB": (2, 3 * image.width), "L": (0, image.width)}[image.mode]
    pixels = image.tobytes()
    lines = b"".join(b"\0" + pixels[start : start + row] for start in range(0, len(pixels), row))
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
