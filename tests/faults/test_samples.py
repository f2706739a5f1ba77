"""Bad pictures and captions: replaced in their slots, counted by reason; other rows are untouched."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.cli import main
from clipkit.data.indexing import build_index
from clipkit.data.sample import RawSample, Unusable, caption, decode_image
from clipkit.types import DataError
from tests.commands import fails, write
from tests.data.makers import encoded, global_run, good, png, raw, same, stream, take, write_shards, write_tar
from tests.train.test_pretrain import spoil

BAD: dict[int, tuple[str, list[tuple[str, bytes]]]] = {
    3: ("bad image", [("000003.png", png(3)[:40]), ("000003.txt", b"x")]),
    4: ("bad image", [("000004.png", b"\xff\xd8\xff rubbish"), ("000004.txt", b"x")]),
    40: ("empty image", [("000040.png", b""), ("000040.txt", b"x")]),
    41: ("missing caption", [("000041.png", png(41))]),
    42: ("missing image", [("000042.txt", b"x")]),
    77: ("empty caption", [("000077.png", png(77)), ("000077.txt", b" \n")]),
    118: ("caption is not UTF-8", [("000118.png", png(1)), ("000118.txt", b"\xff\xfe\xfa")]),
}


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changed = {number: members for number, (_, members) in BAD.items()}
    return write_shards(tmp_path_factory.mktemp("spoiled"), [37, 1, 50, 9, 23], changed)


@pytest.mark.parametrize("batch_size", [8, 24])
@pytest.mark.fault(
    "F8",
    "pictures cut, random, empty",
    "exactly those are replaced by good ones and counted; every other row stays as it was",
)
@pytest.mark.fault(
    "F9",
    "no caption, no picture, an empty caption, white space, bytes that are no UTF-8",
    "exactly those are replaced by good ones and counted by reason; every other row stays as it was",
)
def test_f08_f09_bad_samples_are_replaced_in_place(uneven: Path, spoiled: Path, batch_size: int) -> None:
    """Exactly the bad samples are replaced, by good ones; every other row is as if nothing had happened."""
    steps = 120 // batch_size
    clean = take(stream(uneven, batch_size), 0, steps)
    dirty = take(stream(spoiled, batch_size), 0, steps)
    rejects = [reject for batch in dirty for reject in batch.rejects]
    assert sorted((int(reject.key), reject.reason) for reject in rejects) == [
        (number, reason) for number, (reason, _) in sorted(BAD.items())
    ]
    for before, after in zip(clean, dirty, strict=True):
        for row, number in enumerate(before.ids.tolist()):
            if number in BAD:
                (reject,) = [entry for entry in after.rejects if entry.slot == int(after.slots[row])]
                assert after.keys[row] == reject.substitute
                assert int(after.ids[row]) not in BAD
                assert reject.shard.endswith(".tar")
            else:
                assert torch.equal(after.images["image"][row], before.images["image"][row])
                assert after.ids[row] == before.ids[row]


@pytest.mark.fault(
    "F8", "bad pictures with 3 processes, and with loader workers", "the same substitutes, the same counts"
)
@pytest.mark.fault(
    "F9", "missing members with 3 processes, and with loader workers", "the same substitutes, the same counts"
)
def test_f08_f09_rejects_do_not_depend_on_ranks_or_workers(spoiled: Path) -> None:
    reference = take(stream(spoiled, 24), 0, 5)
    assert same(global_run(spoiled, 24, 3, 0, 5), reference)
    assert same(take(stream(spoiled, 24, workers=2), 0, 5), reference)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.fault(
    "F9", "25 samples in a row without a picture", "the run stops at `data.max_consecutive`, naming the first"
)
def test_f09_too_many_in_a_row_stop_the_run(tmp_path: Path, workers: int) -> None:
    """The error of a worker is the same DataError in the main process."""
    bad = {number: [(f"{number:06d}.txt", b"x")] for number in range(5, 30)}
    opened = stream(write_shards(tmp_path / "set", [30], bad), 6, workers=workers, max_consecutive=4)
    with pytest.raises(
        DataError, match=r"4 unusable samples in a row, the first: 0000.*missing image"
    ) as caught:
        take(opened, 0, 5)
    assert "data.max_consecutive" in caught.value.cure
    opened.close()


def flat_png(width: int, height: int) -> bytes:
    """A PNG of one colour, small whatever its size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    pack = zlib.compressobj(9)
    row = bytes(1 + width)
    body = b"".join(pack.compress(row) for _ in range(height)) + pack.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.fault(
    "F8",
    "JPEG, PNG, WebP, GIF and BMP cut at many lengths, or with six bytes of noise",
    "refused, or decoded where the noise does no harm; never another error",
)
def test_f08_broken_images_are_refused() -> None:
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
@pytest.mark.fault(
    "F10",
    "captions that are not UTF-8, hold NUL, are 10 MB long; JSON nested 100,000 deep, of another type, with "
    "half a surrogate",
    "refused by reason before the tokenizer; a short message",
)
def test_f10_captions_that_are_refused(sample: RawSample, field: str, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        caption(sample, field)
    assert caught.value.reason == reason
    assert len(caught.value.detail) < 300


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"  a red car\n", "a red car"),
        ("\ufeffmit BOM".encode(), "mit BOM"),
        ("שלום \u202eabc".encode(), "שלום \u202eabc"),
        ("é ✂ 🙂".encode(), "é ✂ 🙂"),
    ],
)
@pytest.mark.fault(
    "F10",
    "a byte-order mark, right-to-left marks, signs outside the basic plane",
    "kept; the mark is removed",
)
def test_f10_captions_that_are_kept(text: bytes, expected: str) -> None:
    assert caption(raw(txt=text), "txt") == expected
    as_json = json.dumps({"deep": {"caption": text.decode()}}).encode()
    assert caption(raw(json=as_json), "json.deep.caption") == expected


@pytest.mark.fault(
    "F11",
    "a PNG of 12,000 x 12,000 (18 KB) and one of 50,000 x 50,000 pixels, extreme aspect ratios",
    "refused from the header; nothing is decoded",
)
def test_f11_pixels_are_limited_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.fault(
    "F11", "a GIF of 50 frames; a text chunk that unpacks to 200 MB", "the first frame; refused"
)
def test_f11_many_frames_and_large_text_chunks() -> None:
    frames = [Image.new("P", (4, 4), number % 7) for number in range(50)]
    many = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(many).size == (4, 4)
    bomb = zlib.compress(bytes(200_000_000), 9)
    body = b"Comment\0\0" + bomb
    data = png(0)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    with pytest.raises(Unusable, match="bad image"):
        decode_image(data[:33] + chunk + data[33:])


@pytest.mark.fault("F11", "a picture above `data.max_pixels`", "replaced and counted")
def test_f11_pixel_limit_reaches_the_decoder(tmp_path: Path) -> None:
    samples = [good(0), good(1), [("000002.png", png(2, size=40)), ("000002.txt", b"large")]]
    shards = write_tar(tmp_path / "a.tar", samples)
    (batch,) = take(stream(shards, 3, max_pixels=1000), 0, 1)
    assert [(reject.key, reject.reason) for reject in batch.rejects] == [("000002", "too many pixels")]


@pytest.mark.fault("F8", "a corrupt picture in a run", "the run ends well; rejects.jsonl names the sample")
def test_f08_a_corrupt_image_is_counted_and_replaced(
    capsys: pytest.CaptureFixture[str], config: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    config["data"]["train"] = str(spoil(shards, tmp_path / "spoiled", {"000003"}))
    assert main(["pretrain", str(write(config, tmp_path / "c.yaml")), "data.max_reject_fraction=0.1"]) == 0
    (line,) = (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "000003"


@pytest.mark.fault(
    "F9", "a missing caption with `data.max_reject_fraction=0`", "exit 3; rejects.jsonl names the sample"
)
def test_f09_a_missing_caption_stops_a_run_that_allows_none(
    capsys: pytest.CaptureFixture[str], config: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    with tarfile.open(shards / "00000.tar") as source, tarfile.open(shards / "new.tar", "w") as target:
        for member in source:
            if member.name != "000005.txt":
                target.addfile(member, source.extractfile(member))
    (shards / "new.tar").replace(shards / "00000.tar")
    config["data"]["max_reject_fraction"] = 0.0
    assert fails(capsys, 3, "caption", "pretrain", write(config, tmp_path / "c.yaml"))
    assert '"000005"' in (tmp_path / "run" / "rejects.jsonl").read_text()


@pytest.mark.fault(
    "F8",
    "one bit of a picture flipped so that it still decodes",
    "not seen: only a hash of the shard, or a server's tag, can tell",
)
def test_f08_rot_that_decodes_is_not_seen(tmp_path: Path) -> None:
    bitmap = encoded(Image.open(io.BytesIO(png(0))), "BMP")
    rotten = bytearray(bitmap)
    rotten[-1] ^= 1
    for name, data in (("whole", bitmap), ("rotten", bytes(rotten))):
        write_tar(tmp_path / f"{name}.tar", [[("0.bmp", data), ("0.txt", b"x")]])
    assert not np.array_equal(np.asarray(decode_image(bytes(rotten))), np.asarray(decode_image(bitmap)))
    (batch,) = take(stream(tmp_path / "rotten.tar", 1), 0, 1)
    assert batch.rejects == ()
    whole, changed = (build_index([str(tmp_path / f"{name}.tar")]) for name in ("whole", "rotten"))
    assert whole.sha == changed.sha


@pytest.mark.fault(
    "F11",
    "a GIF of 5,000 frames, a JPEG with 60 KB of EXIF",
    "the first frame and the picture, in little memory",
)
def test_f11_frames_and_exif_are_not_unpacked() -> None:
    frames = [Image.new("P", (2, 2), number % 7) for number in range(5_000)]
    many = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    described = encoded(Image.open(io.BytesIO(png(0))), "JPEG", exif=exif)
    tracemalloc.start()
    try:
        assert decode_image(many).size == (2, 2)
        assert decode_image(described).size == (8, 8)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.fault("F12", "extensions in upper case", "the sample they name")
def test_f12_upper_case_extensions(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [[("0.PNG", png(0)), ("0.Txt", b"loud")], good(1)])
    (batch,) = take(stream(shard, 2), 0, 1)
    assert sorted(batch.keys) == ["0", "000001"]
    assert batch.rejects == ()
