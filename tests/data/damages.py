"""Every damage of the list of faults that concerns shards, made at a chosen sample of a shard."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.makers import Members, encoded, png

SAMPLES = 9
Change = Callable[[list[Members], int], bytes]


@dataclass(frozen=True)
class Damage:
    """One damage of a shard of SAMPLES samples.

    row      of the list of faults
    kind     of finding that it must lead to
    make     (samples, place) -> bytes of the shard
    lost     what a repair cannot keep: "one" (the sample at the place), "next" (and the one after it),
             "rest" (from the place on), "later" (behind the place), "all", "none"
    first    the kind where the place is the first sample, "" for the same
    note     worth knowing only: training takes the sample
    """

    row: str
    name: str
    kind: str
    make: Change
    lost: str = "one"
    note: bool = False
    first: str = ""

    def lost_at(self, place: int) -> set[int]:
        """Returns the numbers of the samples that a repair cannot keep."""
        first = {"all": 0, "later": place + 1}.get(self.lost, place)
        last = {"none": place, "one": place + 1, "next": place + 2}.get(self.lost, SAMPLES)
        return set(range(first, min(last, SAMPLES)))


def key(number: int) -> str:
    return f"{number:06d}"


def sample(number: int) -> Members:
    """A JPEG, a caption and fields, different for every number."""
    return list(_sample(number))


@cache
def _sample(number: int) -> tuple[tuple[str, bytes], ...]:
    pixels = np.random.default_rng(number).integers(0, 256, (12, 10, 3)).astype(np.uint8)
    picture = encoded(Image.fromarray(pixels), "JPEG", quality=90)
    fields = json.dumps({"number": number}).encode()
    return (
        (f"{key(number)}.jpg", picture),
        (f"{key(number)}.json", fields),
        (f"{key(number)}.txt", f"caption {number}".encode()),
    )


def tar_bytes(samples: Iterable[Members], form: int = tarfile.PAX_FORMAT) -> bytes:
    """The samples as a tar file, by tarfile alone."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for members in samples:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def header_of(data: bytes, name: str) -> int:
    """Byte of a member's header."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmember(name).offset


def _in_tar(name: str, change: Callable[[bytearray, int], object]) -> Change:
    """Changes the bytes of the finished tar; `change` gets them and the byte of KEY.name at the place."""

    def make(samples: list[Members], place: int) -> bytes:
        data = bytearray(tar_bytes(samples))
        change(data, header_of(bytes(data), f"{key(place)}.{name}"))
        return bytes(data)

    return make


def _cut(name: str, after: int) -> Change:
    return _in_tar(name, lambda data, at: data.__delitem__(slice(at + after, None)))


def _delete(name: str, begin: int, end: int) -> Change:
    return _in_tar(name, lambda data, at: data.__delitem__(slice(at + begin, at + end)))


def _fill(name: str, begin: int, filling: bytes) -> Change:
    return _in_tar(
        name, lambda data, at: data.__setitem__(slice(at + begin, at + begin + len(filling)), filling)
    )


def _insert(name: str, begin: int, filling: bytes) -> Change:
    return _in_tar(name, lambda data, at: data.__setitem__(slice(at + begin, at + begin), filling))


def _sealed(name: str, begin: int, field: bytes) -> Change:
    """A field of the header replaced, with a checksum that fits."""

    def change(data: bytearray, at: int) -> None:
        block = data[at : at + 512]
        block[begin : begin + len(field)] = field
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        data[at : at + 512] = block

    return _in_tar(name, change)


def _whole(data: Callable[[bytes], bytes]) -> Change:
    return lambda samples, place: data(tar_bytes(samples))


def _ends(data: bytes, zeros: int) -> bytes:
    """The tar with so many bytes of its end-of-archive blocks: behind a header and a short caption."""
    return data[: header_of(data, f"{key(SAMPLES - 1)}.txt") + 1024 + zeros]


def _member(name: str, data: bytes | Callable[[bytes], bytes]) -> Change:
    """Replaces the contents of KEY.name."""

    def make(samples: list[Members], place: int) -> bytes:
        changed = [
            (member, (data(old) if callable(data) else data) if member.endswith(f".{name}") else old)
            for member, old in samples[place]
        ]
        return tar_bytes([*samples[:place], changed, *samples[place + 1 :]])

    return make


def _samples(change: Callable[[Members], Members]) -> Change:
    """Replaces the members of the sample."""
    return lambda samples, place: tar_bytes([*samples[:place], change(samples[place]), *samples[place + 1 :]])


def _without(name: str) -> Change:
    return _samples(lambda members: [entry for entry in members if not entry[0].endswith(f".{name}")])


def _picture(name: str, data: Callable[[], bytes]) -> Change:
    """Replaces the image, under another extension."""

    def change(members: Members) -> Members:
        key_of, kept = members[0][0].partition(".")[0], members[1:]
        return [(f"{key_of}.{name}", data()), *kept]

    return _samples(change)


def _two_tars(samples: list[Members], place: int) -> bytes:
    return tar_bytes(samples[: place + 1]) + tar_bytes(samples[place + 1 :] or samples[:1])


def _interleaved(samples: list[Members], place: int) -> bytes:
    other = (place + 1) % SAMPLES
    first, second = min(place, other), max(place, other)
    rest = [members for number, members in enumerate(samples) if number not in (first, second)]
    mixed = [entry for pair in zip(samples[first], samples[second], strict=True) for entry in pair]
    return tar_bytes([*rest[:first], mixed, *rest[first:]])


def _again(samples: list[Members], place: int) -> bytes:
    return tar_bytes(
        [*samples, samples[place]] if place < SAMPLES - 1 else [*samples, samples[0], samples[place]]
    )


def _dotted(samples: list[Members], place: int) -> bytes:
    renamed = [
        (name.replace(".", f".{version}.", 1), data)
        for version in ("v1", "v2")
        for name, data in samples[place]
    ]
    return tar_bytes([*samples[:place], renamed, *samples[place + 1 :]])


def _special(kind: bytes, name: str = "{key}.jpg", **header: str) -> Change:
    """Puts a member without payload of another type in the place of the image."""

    def make(samples: list[Members], place: int) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for number, members in enumerate(samples):
                for member, data in members:
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    if number == place and member.endswith(".jpg"):
                        info.name = name.format(key=key(place))
                        if kind != tarfile.REGTYPE:
                            info.type, info.linkname, info.size = kind, "/etc/passwd", 0
                        info.pax_headers = dict(header)
                    tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
        return out.getvalue()

    return make


def _long_name(change: Callable[[bytearray, int], object]) -> Change:
    """Damages the extended header before a member with a long name."""

    def make(samples: list[Members], place: int) -> bytes:
        long = [(f"{'n' * 120}{name}", data) for name, data in samples[place]]
        data = bytearray(tar_bytes([*samples[:place], long, *samples[place + 1 :]]))
        with tarfile.open(fileobj=io.BytesIO(bytes(data))) as tar:
            change(data, tar.getmember(long[0][0]).offset)
        return bytes(data)

    return make


def _bomb(side: int) -> Callable[[], bytes]:
    """A PNG whose header claims side x side pixels."""

    def make() -> bytes:
        head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        body = b"IDAT" + zlib.compress(bytes(1 << 16), 9)
        chunks = (head, body, b"IEND")
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
            for chunk in chunks
        )

    return make


@cache
def _text_bomb() -> bytes:
    body = b"zTXt" + b"Comment\0\0" + zlib.compress(bytes(8_000_000), 9)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = png(0)
    return data[:33] + chunk + data[33:]


@cache
def _frames() -> bytes:
    pictures = [Image.new("RGB", (2, 2), (number, 255 - number, 0)) for number in range(200)]
    return encoded(pictures[0], "GIF", save_all=True, append_images=pictures[1:])


@cache
def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    return encoded(Image.open(io.BytesIO(png(0))), "JPEG", exif=exif)


@cache
def _noise(size: int) -> bytes:
    return np.random.default_rng(7).integers(1, 256, size).astype(np.uint8).tobytes()


_BROKEN_PAX = _long_name(lambda data, at: data.__setitem__(slice(at + 512, at + 516), b"9x9 "))
_BROKEN_LONG = _long_name(lambda data, at: data.__setitem__(at + 3, 65))

DAMAGES = [
    Damage("F5", "cut in the payload of an image", "size beyond the file", _cut("jpg", 600), "rest"),
    Damage("F5", "cut in a header", "cut tar", _cut("jpg", 100), "rest"),
    Damage("F5", "cut at the border of a sample", "cut tar", _cut("jpg", 0), "rest", first="empty file"),
    Damage("F5", "cut between image and caption", "cut tar", _cut("txt", 0), "rest"),
    Damage("F5", "cut in a caption", "size beyond the file", _cut("txt", 515), "rest"),
    Damage("F5", "cut behind a caption, in its padding", "cut tar", _cut("txt", 700), "later"),
    Damage("F5", "cut in the end blocks", "cut tar", _whole(lambda data: _ends(data, 100)), "none"),
    Damage("F6", "empty file", "empty file", _whole(lambda data: b""), "all"),
    Damage("F6", "web page", "not a tar", _whole(lambda data: b"<html>" + b"404 " * 500), "all"),
    Damage("F6", "gzip named .tar", "not a tar", _whole(gzip.compress), "all"),
    Damage("F6", "random bytes named .tar", "not a tar", _whole(lambda data: _noise(9_000)), "all"),
    Damage("F6", "1 KB of zeros over a header", "zeros", _fill("jpg", 0, bytes(1024))),
    Damage("F6", "zeros to the end", "zeros",
           _in_tar("jpg", lambda data, at: data.__setitem__(slice(at, None), bytes(20_000))), "rest"),
    Damage("F6", "header with a wrong checksum", "bad header", _fill("jpg", 3, b"A")),
    Damage("F6", "noise over a header", "bad header", _fill("json", 0, _noise(512)), "none"),
    Damage("F6", "noise over a header and its payload", "bad header", _fill("jpg", 0, _noise(1100))),
    Damage("F6", "100 bytes missing in a payload", "torn member", _delete("jpg", 600, 700)),
    Damage("F6", "512 bytes missing in a payload", "torn member", _delete("jpg", 530, 1042)),
    Damage("F6", "5 bytes too many in a payload", "bad header", _insert("jpg", 600, b"12345")),
    Damage("F6", "a member's header missing", "bad header", _delete("jpg", 0, 512)),
    Damage("F6", "data behind the end", "zeros", _whole(lambda data: data + b"more"), "none"),
    Damage("F6", "two tars in one file", "zeros",
           _two_tars, "none"),
    Damage("F8", "JPEG cut", "bad image", _member("jpg", lambda data: data[: len(data) // 2])),
    Damage("F8", "JPEG of random bytes", "bad image", _member("jpg", _noise(400))),
    Damage("F8", "JPEG of zeros", "bad image", _member("jpg", bytes(400))),
    Damage("F8", "empty image", "empty image", _member("jpg", b"")),
    Damage("F8", "web page as image", "bad image", _member("jpg", b"<html>404</html>")),
    Damage("F8", "PNG cut", "bad image", _picture("png", lambda: png(3)[:60])),
    Damage("F9", "missing caption", "missing caption", _without("txt")),
    Damage("F9", "missing image", "missing image", _without("jpg")),
    Damage("F9", "empty caption", "empty caption", _member("txt", b"")),
    Damage("F9", "caption of white space", "empty caption", _member("txt", " \n\t\u00a0".encode())),
    Damage("F10", "caption that is not UTF-8", "caption is not UTF-8", _member("txt", b"caf\xe9")),
    Damage("F10", "caption in UTF-16", "bad caption", _member("txt", "utf".encode("utf-16-le"))),
    Damage("F10", "NUL in a caption", "bad caption", _member("txt", b"a\0b")),
    Damage("F10", "byte-order mark", "byte-order mark", _member("txt", "\ufeffa car".encode()), "none", True),
    Damage("F10", "caption of 10 MB", "caption too long", _member("txt", b"x" * 10_000_000)),
    Damage("F10", "JSON nested 10,000 deep", "bad JSON", _member("json", b"[" * 10_000 + b"]" * 10_000)),
    Damage("F10", "JSON cut", "bad JSON", _member("json", b'{"number": ')),
    Damage("F11", "PNG of 12,000 x 12,000", "too many pixels", _picture("png", _bomb(12_000))),
    Damage("F11", "PNG of 50,000 x 50,000", "too many pixels", _picture("png", _bomb(50_000))),
    Damage("F11", "PNG with a text that unpacks to 8 MB", "bad image", _picture("png", _text_bomb)),
    Damage("F11", "60 KB of EXIF", "much metadata", _member("jpg", lambda data: _exif()), "none", True),
    Damage("F11", "GIF of many frames", "several frames", _picture("gif", _frames), "none", True),
    Damage("F11", "image of 2,000 x 1 pixels", "extreme aspect ratio",
           _picture("png", lambda: encoded(Image.new("L", (2_000, 1)), "PNG"))),
    Damage("F12", "key used twice", "key used twice", _again, "none"),
    Damage("F12", "interleaved members", "key used twice", _interleaved, "none"),
    Damage("F12", "two members of one name", "member twice",
           _samples(lambda members: [members[0], *members]), "none"),
    Damage("F12", "dots in the names", "dots in names", _dotted),
    Damage("F12", "upper-case extensions", "upper-case extension",
           _samples(lambda members: [(name.upper(), data) for name, data in members]), "none", True),
    Damage("F28", "a name with ../", "unsafe name", _special(tarfile.REGTYPE, "../{key}.jpg")),
    Damage("F28", "an absolute name", "unsafe name", _special(tarfile.REGTYPE, "/tmp/{key}.jpg")),
    Damage("F28", "symbolic link", "not a file", _special(tarfile.SYMTYPE)),
    Damage("F28", "hard link", "not a file", _special(tarfile.LNKTYPE)),
    Damage("F28", "device", "not a file", _special(tarfile.CHRTYPE)),
    Damage("F28", "pipe", "not a file", _special(tarfile.FIFOTYPE)),
    Damage("F28", "sparse file (GNU)", "not a file", _special(tarfile.GNUTYPE_SPARSE)),
    Damage("F28", "sparse file (PAX)", "not a file",
           _special(tarfile.REGTYPE, **{"GNU.sparse.major": "1", "GNU.sparse.realsize": "9"})),
    Damage("F28", "member that claims 8 EB", "size beyond the file",
           _sealed("jpg", 124, b"\x80" + bytes(3) + (2**63 - 1).to_bytes(8, "big"))),
    Damage("F28", "member of negative size", "bad header", _sealed("jpg", 124, b"\xff" * 12)),
    Damage("F28", "size that is not octal", "bad header", _sealed("jpg", 124, b"12x45678901\0")),
    Damage("F28", "extended header that is no record", "bad extended header", _BROKEN_PAX),
    Damage("F28", "extended header with a wrong checksum", "bad header", _BROKEN_LONG),
    Damage("F28", "hidden member", "unread members",
           _samples(lambda members: [(".hidden", b"x"), *members]), "none", True),
]  # fmt: skip


def write_damaged(path: Path, damage: Damage, place: int) -> Path:
    """Writes a shard with the damage at sample `place`."""
    path.write_bytes(damage.make([sample(number) for number in range(SAMPLES)], place))
    return path
