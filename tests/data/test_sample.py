"""One sample: captions, images, and every reason to refuse them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from clipkit.data.sample import Unusable, as_rgb, decode_image, image_bytes, parse_chunk
from clipkit.types import DataError
from tests.data.makers import encoded, raw


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "CMYK", "LA", "I;16"])
def test_every_mode_becomes_rgb(kind: str, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    source = Image.fromarray(pixels)
    image = Image.new("I;16", (7, 9), 40_000) if mode == "I;16" else source.convert(mode)
    try:
        data = encoded(image, kind)
    except (OSError, ValueError):
        return  # this format has no such mode
    decoded = decode_image(data)
    assert decoded.mode == "RGB"
    assert decoded.size == (7, 9)
    if mode == "I;16" and kind == "PNG":
        assert np.all(np.asarray(decoded) == 40_000 >> 8)
    if mode == "RGB" and kind in ("PNG", "BMP"):
        assert np.array_equal(np.asarray(decoded), pixels)


def test_transparency_is_laid_on_the_background() -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 3] = [0, 0, 255, 255]
    data = encoded(Image.fromarray(pixels), "PNG")
    assert np.asarray(decode_image(data))[0, :, 0].tolist() == [255, 255, 0, 0]
    assert np.asarray(decode_image(data, background=(9, 8, 7)))[0, 0].tolist() == [9, 8, 7]
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 0)
    data = encoded(palette, "PNG", transparency=0)
    assert np.asarray(decode_image(data))[0].tolist() == [[255, 255, 255], [0, 0, 255]]
    assert as_rgb(decode_image(data)).mode == "RGB"


def test_image_member_is_found_by_extension() -> None:
    assert image_bytes(raw(txt=b"a", png=b"b")) == b"b"
    assert image_bytes(raw(webp=b"w", jpg=b"j")) == b"j"
    with pytest.raises(Unusable, match="missing image"):
        image_bytes(raw(txt=b"a", tiff=b"b"))


def test_chunk_that_does_not_fit_the_index() -> None:
    with pytest.raises(DataError, match=r"s.tar: the chunk at byte 512.*0 samples instead of 3"):
        parse_chunk(b"", 3, "s.tar", 512)
    with pytest.raises(DataError, match=r"clipkit index --verify s\.tar"):
        parse_chunk(b"x" * 1024, 3, "s.tar", 512)
