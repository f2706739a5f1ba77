"""The bytes of an image: unchanged by default, otherwise what Pillow's own functions give."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from clipkit.data.making import ImageRules
from clipkit.data.making.images import inspect
from clipkit.data.sample import Unusable, decode_image
from clipkit.types import ConfigError
from tests.data.making.makers import picture


def photo(size: tuple[int, int], name: str = "JPEG", orientation: int = 1, mode: str = "RGB") -> bytes:
    gradient = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3)
    image = Image.fromarray(gradient.astype("uint8")).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    image.save(stream, name, exif=exif.tobytes()) if orientation != 1 else image.save(stream, name)
    return stream.getvalue()


def opened(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_bytes_are_copied_by_default(name: str) -> None:
    content = picture(3, name=name)
    prepared = ImageRules().prepare(content)
    assert prepared.content is content
    assert prepared.extension == {"JPEG": "jpg"}.get(name, name.lower())


@pytest.mark.parametrize(
    ("size", "mode", "length", "expected"),
    [
        ((200, 100), "shorter", 50, (100, 50)),
        ((100, 200), "shorter", 50, (50, 100)),
        ((200, 100), "longer", 50, (50, 25)),
        ((200, 100), "keep", 50, (200, 100)),
        ((200, 100), "shorter", 150, (200, 100)),
        ((301, 97), "longer", 100, (100, 32)),
        ((900, 10), "longer", 40, (40, 1)),
    ],
)
def test_sizes(size: tuple[int, int], mode: str, length: int, expected: tuple[int, int]) -> None:
    content = photo(size)
    prepared = ImageRules(length, mode).prepare(content)
    assert opened(prepared.content).size == expected
    assert prepared.encoded == (size != expected)
    assert (prepared.content == content) == (size == expected)
    if size != expected:
        reference = io.BytesIO()
        resized = opened(content).convert("RGB").resize(expected, Image.Resampling.LANCZOS)
        resized.save(reference, "JPEG", quality=95, optimize=True)
        assert prepared.content == reference.getvalue()


def test_enlarging_is_asked_for() -> None:
    assert opened(ImageRules(60, enlarge=True).prepare(photo((40, 30))).content).size == (80, 60)
    with pytest.raises(ConfigError, match="enlarged only to a length"):
        ImageRules(enlarge=True)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_kept_or_put_into_the_pixels(orientation: int, name: str) -> None:
    content = photo((40, 20), name, orientation)
    kept = ImageRules().prepare(content)
    assert kept.content == content
    assert kept.rotated == (orientation != 1)
    turned = ImageRules(quality=90).prepare(content)
    upright = ImageOps.exif_transpose(opened(content))
    assert upright is not None
    found = opened(turned.content)
    assert not turned.rotated
    assert found.size == upright.size
    assert found.getexif().get(0x0112, 1) == 1
    difference = np.asarray(found, dtype=int) - np.asarray(upright.convert("RGB"), dtype=int)
    assert np.abs(difference).mean() < 3


def test_a_length_is_that_of_the_upright_image() -> None:
    prepared = ImageRules(10, "shorter").prepare(photo((40, 20), orientation=6))
    assert opened(prepared.content).size == (10, 20)
    # Small enough, but turned: encoded again all the same.
    assert opened(ImageRules(100).prepare(photo((40, 20), orientation=6)).content).size == (20, 40)


def test_transparency_lies_on_white_as_in_training() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    for suffix in ("jpg", "png", "webp"):
        prepared = ImageRules(4, format=suffix).prepare(stream.getvalue())
        assert prepared.extension == suffix
        assert opened(prepared.content).convert("RGB").getpixel((2, 2)) == (255, 255, 255)


@pytest.mark.parametrize(("name", "suffix"), [("GIF", "png"), ("BMP", "png"), ("WEBP", "webp")])
def test_formats_that_cannot_be_kept_lose_nothing(name: str, suffix: str) -> None:
    prepared = ImageRules(20).prepare(photo((80, 80), name))
    assert prepared.extension == suffix
    assert opened(prepared.content).format == suffix.upper()


def test_notes_of_the_source_are_left_behind() -> None:
    stream = io.BytesIO()
    image = Image.new("RGB", (50, 50))
    image.save(stream, "PNG", icc_profile=b"profile", dpi=(300, 300))
    found = opened(ImageRules(20).prepare(stream.getvalue()).content)
    assert found.info == {}


def header_only(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("1", (1, 1)).save(stream, "PNG")
    content = bytearray(stream.getvalue())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty image"),
        (b"<html>404</html>", "not an image"),
        (b"II*\0" + b"\0" * 30, "image format not read"),
        (b"\0\0\0\x1cftypavif" + b"\0" * 30, "image format not read"),
        (b"<svg></svg>", "image format not read"),
        (b"\xff\xd8\xff", "bad image"),
        (picture(1)[:40], "bad image"),
        (header_only(40_000, 40_000), "too many pixels"),
        (header_only(60_000, 100), "extreme aspect ratio"),
    ],
)
def test_what_training_would_refuse_by_its_header_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        inspect(content)
    assert caught.value.reason == reason
    with pytest.raises(Unusable):
        decode_image(content)


def test_damage_behind_the_header_is_found_where_pixels_are_needed() -> None:
    content = picture(5, (300, 300), quality=100)[:-200]
    damaged = picture(5, (300, 300), name="PNG")[:-40]
    assert ImageRules().prepare(content).content == content
    with pytest.raises(Unusable, match="bad image"):
        ImageRules(32).prepare(damaged)


def test_options_that_contradict_each_other() -> None:
    for options in ({"format": "png", "quality": 80}, {"format": "tiff"}, {"resize_mode": "wider"}):
        with pytest.raises(ConfigError):
            ImageRules(**options)  # type: ignore[arg-type]
