"""One sample: captions, images, and every reason to refuse them."""

from __future__ import annotations

import io
import json
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from clipkit.data.sample import RawSample, Unusable, as_rgb, caption, decode_image, image_bytes, parse_chunk
from clipkit.types import DataError
from tests.data.makers import png


def raw(**members: bytes) -> RawSample:
    spans, chunk = {}, b""
    for extension, data in members.items():
        spans[extension] = (len(chunk), len(chunk) + len(data))
        chunk += data
    return RawSample("key", spans, chunk)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def flat_png(width: int, height: int) -> bytes:
    """A PNG of one colour, small whatever its size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    pack = zlib.compressobj(9)
    row = bytes(1 + width)
    body = b"".join(pack.compress(row) for _ in range(height)) + pack.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"  a red car\n", "a red car"),
        ("\ufeffmit BOM".encode(), "mit BOM"),
        ("שלום \u202eabc".encode(), "שלום \u202eabc"),
        ("é ✂ 🙂".encode(), "é ✂ 🙂"),
    ],
)
def test_captions_that_are_kept(text: bytes, expected: str) -> None:
    assert caption(raw(txt=text), "txt") == expected
    as_json = json.dumps({"deep": {"caption": text.decode()}}).encode()
    assert caption(raw(json=as_json), "json.deep.caption") == expected


@pytest.mark.parametrize(
    ("sample", "field", "reason"),
    [
        (raw(jpg=b"x"), "txt", "missing caption"),
        (raw(txt=b""), "txt", "empty caption"),
        (raw(txt=" \n\t\u00a0".encode()), "txt", "empty caption"),
        (raw(txt=b"caf\xe9"), "txt", "caption is not UTF-8"),
        (raw(txt="utf sixteen".encode("utf-16-le")), "txt", "bad caption"),
        (raw(txt=b"x" * 10_000_000), "txt", "caption too long"),
        (raw(json=b"{"), "json.caption", "bad caption JSON"),
        (raw(json=b"[" * 100_000 + b"]" * 100_000), "json.caption", "bad caption JSON"),
        (raw(json=b'{"other": "x"}'), "json.caption", "missing caption"),
        (raw(json=b'["x"]'), "json.caption", "missing caption"),
        (raw(json=b'{"caption": 7}'), "json.caption", "caption is not text"),
        (raw(json=b'{"caption": null}'), "json.caption", "caption is not text"),
        (raw(json=rb'{"caption": "half \ud83d a pair"}'), "json.caption", "caption is not UTF-8"),
    ],
)
def test_captions_that_are_refused(sample: RawSample, field: str, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        caption(sample, field)
    assert caught.value.reason == reason
    assert len(caught.value.detail) < 300


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


def test_pixels_are_limited_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """12000 x 12000 only warns in Pillow and takes 725 MB; nothing may be decoded here."""
    monkeypatch.setattr(Image.Image, "load", None)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    limit = Image.MAX_IMAGE_PIXELS
    for side in (12_000, 50_000):
        head = flat_png(side, 1)[:16] + struct.pack(">II", side, side)
        data = head + flat_png(side, 1)[24:29] + struct.pack(">I", zlib.crc32(head[12:] + b"\x08\0\0\0\0"))
        data += flat_png(side, 1)[33:]
        with pytest.raises(Unusable, match="too many pixels"):
            decode_image(data)
    assert limit == Image.MAX_IMAGE_PIXELS
    with pytest.raises(Unusable, match="too many pixels"):
        decode_image(flat_png(100, 100), max_pixels=9_999)
    with pytest.raises(Unusable, match="extreme aspect ratio"):
        decode_image(flat_png(2_000, 1))


def test_many_frames_and_large_text_chunks() -> None:
    frames = [Image.new("P", (4, 4), number % 7) for number in range(50)]
    many = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(many).size == (4, 4)
    bomb = zlib.compress(bytes(200_000_000), 9)
    body = b"Comment\0\0" + bomb
    data = png(0)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    with pytest.raises(Unusable, match="bad image"):
        decode_image(data[:33] + chunk + data[33:])


def test_broken_images_are_refused() -> None:
    """Cut at every length or filled with noise: refused or decoded, never another error."""
    pixels = np.random.default_rng(1).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    rng = np.random.default_rng(2)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        data = encoded(Image.fromarray(pixels), kind)
        refused = 0
        for length in range(0, len(data) - 40, 23):
            with pytest.raises(Unusable):
                decode_image(data[:length])
            refused += 1
        assert refused
        for _ in range(60):
            noisy = bytearray(data)
            for at in rng.integers(0, len(data), 6):
                noisy[at] = rng.integers(256)
            with suppress(Unusable):
                assert decode_image(bytes(noisy)).mode == "RGB"
    for data in (b"", b"not an image", b"%!PS-Adobe-3.0 EPSF\n%%BoundingBox: 0 0 9 9\n"):
        with pytest.raises(Unusable):
            decode_image(data)


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
