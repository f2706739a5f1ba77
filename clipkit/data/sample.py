"""One sample, from the bytes of a chunk to an RGB image and a caption, or the reason why it is refused.

Nothing here trusts its input: sizes are checked before anything is allocated or decoded, text is strict
UTF-8, and only image formats of a fixed list are opened. EXIF orientation is not applied (as in open_clip).
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from clipkit.data.tar_format import IMAGE_EXTENSIONS, split_name, walk
from clipkit.types import DataError

MAX_PIXELS = 64_000_000
MAX_ASPECT = 100  # longer to shorter side; beyond it a resize by the shorter side would explode
MAX_CAPTION_BYTES = 1 << 16
MAX_JSON_BYTES = 1 << 20
WHITE = (255, 255, 255)
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# What Pillow's decoders raise on damaged data.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError,
    OverflowError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


class Unusable(Exception):
    """A sample that must be replaced: `reason` is one of a few words to count by, `detail` says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Absent(Unusable):
    """The field is not there, or holds nothing: an optional view does without it."""


class RawSample(NamedTuple):
    """The members of one sample: key, and extension -> (begin, end) within the bytes of its chunk."""

    key: str
    members: dict[str, tuple[int, int]]
    chunk: bytes

    def member(self, extension: str) -> bytes | None:
        """Returns the bytes of a member, None when the sample has none of this extension."""
        span = self.members.get(extension)
        return None if span is None else self.chunk[span[0] : span[1]]


def parse_chunk(chunk: bytes, count: int, shard: str, begin: int) -> list[RawSample]:
    """Returns the `count` samples of a chunk read at byte `begin` of a shard.

    Raises DataError when the bytes are not what the index saw there.
    """
    samples: list[RawSample] = []
    key: str | None = None
    members: dict[str, tuple[int, int]] = {}
    try:
        for member in walk(_reader(chunk), 0, len(chunk), shard, whole=False, on_header=_ignore):
            parts = split_name(member.name)
            if parts is None:
                continue
            if parts[0] != key:
                key, members = parts[0], {}
                samples.append(RawSample(key, members, chunk))
            members[parts[1]] = (member.data, member.data + member.size)
        problem = "" if len(samples) == count else f"{len(samples)} samples instead of {count}"
    except DataError as error:
        problem = error.cause.removeprefix(f"{shard}: ")
    if problem:
        raise DataError(
            f"{shard}: the chunk at byte {begin} does not fit the index ({problem})",
            f"the shard changed while it was in use; run: clipkit index --verify {shard}",
        )
    return samples


def _reader(chunk: bytes) -> Any:
    return lambda offset, size: chunk[offset : offset + size]


def _ignore(_: bytes) -> None:
    return None


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, background: Sequence[int] = WHITE) -> Image.Image:
    """Returns the first frame of a JPEG, PNG, WebP, GIF or BMP as an RGB image.

    Transparent pixels are laid on `background`; a plain conversion would show the colour hidden below them.
    Raises Unusable with the reason.
    """
    with opened_image(data, max_pixels) as image:
        return as_rgb(image, background)


@contextmanager
def opened_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The image, not decoded yet, while the block runs; what Pillow raises in it becomes Unusable.

    Size and aspect ratio are checked from the header before decoding: Pillow only warns at 12000 x 12000.
    """
    with _header(data) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise Unusable("too many pixels", f"{width} x {height} is more than {max_pixels}")
        if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
            raise Unusable("extreme aspect ratio", f"{width} x {height}")
        yield image


def image_size(data: bytes) -> tuple[int, int]:
    """Returns (width, height) in pixels as the header of an image says. Raises Unusable with the reason."""
    with _header(data) as image:
        return image.size


@contextmanager
def _header(data: bytes) -> Iterator[Image.Image]:
    if not data:
        raise Unusable("empty image", "0 bytes")
    # Pillow's own limit would warn or raise at open, before ours is compared.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        raise Unusable("bad image", f"none of the formats {', '.join(_FORMATS)}") from None
    except DECODE_ERRORS as error:
        raise Unusable("bad image", f"{type(error).__name__}: {error}".replace("\n", " ")[:200]) from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def as_rgb(image: Image.Image, background: Sequence[int] = WHITE) -> Image.Image:
    """Returns the image in mode RGB, transparent pixels laid on `background`, 16-bit greys as 8-bit."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray(np.clip(grey >> 8, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        if layer.getchannel("A").getextrema() == (255, 255):
            return layer.convert("RGB")
        ground = Image.new("RGBA", layer.size, (*background, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")


def image_bytes(sample: RawSample) -> bytes:
    """Returns the bytes of the image member. Raises Unusable when the sample has none."""
    for extension in IMAGE_EXTENSIONS:
        data = sample.member(extension)
        if data is not None:
            return data
    raise Unusable("missing image", f"members: {', '.join(sample.members)}"[:200])


def field_value(sample: RawSample, field: str, what: str = "caption") -> Any:
    """Returns what stands at `field`: the text of a member ("txt"), or a value of a JSON member.

    "json.a.b" is entry b of entry a; a whole number picks from a list ("json.captions.1"). `what` names the
    field in reasons. Raises Unusable, and Absent for a missing member or entry.
    """
    extension, _, path = field.partition(".")
    data = sample.member(extension)
    if data is None:
        raise Absent(f"missing {what}", f"no .{extension}; members: {', '.join(sample.members)}"[:200])
    if len(data) > (MAX_JSON_BYTES if path else MAX_CAPTION_BYTES):
        raise Unusable(f"{what} too long", f"{len(data)} bytes in .{extension}")
    try:
        value: Any = data.decode("utf-8-sig")
        if path:
            value = json.loads(value)
            for name in path.split("."):
                value = value[int(name)] if isinstance(value, list) and name.isdecimal() else value[name]
    except UnicodeDecodeError as error:
        raise Unusable(f"{what} is not UTF-8", str(error)) from None
    except (ValueError, RecursionError) as error:
        raise Unusable(f"bad {what} JSON", f"{type(error).__name__}: {error}"[:200]) from None
    except (LookupError, TypeError):
        raise Absent(f"missing {what}", f"the JSON has no {path!r}") from None
    return value


def caption(sample: RawSample, field: str, index: int | None = None) -> str:
    """Returns the caption at `field`: a member ("txt"), or a path into a JSON member ("json.caption").

    index: the line of a text member (lines of white space not counted) or the entry of a JSON list; None:
    the whole text, of a list the first entry. Raises Unusable for an over-long (64 KiB) or not strictly
    UTF-8 caption, and Absent for a missing or empty one.
    """
    entries = caption_entries(sample, field, lines=index is not None and "." not in field)
    if len(entries) <= (index or 0):
        raise Absent("missing caption", f"{field} holds {len(entries)} caption(s), no number {index or 0}")
    return checked_caption(entries[index or 0], field)


def caption_entries(sample: RawSample, field: str, lines: bool = False) -> list[Any]:
    """Returns what stands at `field` as a list, unchecked: the entries of a JSON list, or one text, of which
    `lines` makes an entry of each line (but white space). Raises Unusable, and Absent for a missing field.
    """
    value = field_value(sample, field)
    if isinstance(value, list):
        return value
    if isinstance(value, str) and lines:
        return [line for line in value.split("\n") if line.strip()]
    return [value]


def checked_caption(text: Any, field: str = "txt") -> str:
    """Returns an entry of `caption_entries` as a caption; raises Unusable, and Absent for an empty one."""
    if not isinstance(text, str):
        kind = Absent if text is None else Unusable
        raise kind("caption is not text", f"{field} holds {type(text).__name__}")
    text = text.removeprefix("\ufeff").strip()
    if not text:
        raise Absent("empty caption", "nothing but white space")
    if "\0" in text:
        raise Unusable("bad caption", "holds NUL characters (UTF-16 or binary data?)")
    if len(text) > MAX_CAPTION_BYTES:
        raise Unusable("caption too long", f"{len(text)} characters")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON escapes can name half a surrogate pair, which no tokenizer accepts.
        raise Unusable("caption is not UTF-8", str(error)) from None
    return text
