"""The numbers of one shard: histograms of its captions and images, and hashes that show duplicates."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from clipkit.data.captions import field_captions
from clipkit.data.describing.scripts import script_of
from clipkit.data.describing.tokens import TokenRule, counter
from clipkit.data.hash_counts import Hashes, hashes_of, to_text
from clipkit.data.http_ranges import Transient
from clipkit.data.options import CaptionField
from clipkit.data.sample import (
    MAX_PIXELS,
    RawSample,
    Unusable,
    image_bytes,
    opened_image,
)
from clipkit.data.scan import SampleSpan, ShardWalk, opened_shard
from clipkit.data.shard_records import Record
from clipkit.data.tar_format import IMAGE_EXTENSIONS, Read
from clipkit.types import DataError

HASHED = ("caption", "image", "pair")
_FREQUENT = 20  # captions of a shard that may be among the most frequent of the set
_LISTED = 1000  # characters of such a caption, at most
_KEPT = 10_000  # different values of one thing; more are rare ones
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Description:
    """What is described. captions: fields; lines: each line of a text member is a caption of its own."""

    captions: tuple[str, ...] = ("txt",)
    tokens: TokenRule = field(default_factory=TokenRule)
    max_pixels: int = MAX_PIXELS
    lines: bool = False


def describe_shard(path: str, description: Description) -> Record:
    """Returns the numbers of one shard as JSON-able values. Raises DataError for a damaged one."""
    try:
        with opened_shard(path) as opened:
            numbers = _Numbers(description)
            for span in ShardWalk(path, opened.read, opened.size, opened.stamp).samples():
                numbers.sample(span, opened.read)
            return {"size": opened.size, "stamp": opened.stamp, **numbers.record()}
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", "bring the shard back") from None
    except Transient as error:
        raise DataError(f"{path}: {error.reason}", "check the storage") from None
    except DataError as error:
        raise DataError(error.cause, "clipkit data check-shards lists all damage and repairs it") from None


class _Numbers:
    """The numbers of a shard while it is read. Captions are counted in lots, which is faster."""

    _LOT = 2048

    def __init__(self, description: Description) -> None:
        self._description = description
        self._count = counter(description.tokens)
        self._lot: list[str] = []
        self.samples = 0
        self.described = 0
        self.counts: dict[str, Counter[str]] = {
            name: Counter()
            for name in (
                *(
                    "unusable",
                    "words",
                    "characters",
                    "width",
                    "height",
                    "short side",
                    "aspect",
                    "image bytes",
                ),
                *("extensions", "formats", "modes", "turned", "captions per sample"),
            )
        }
        self.tokens: dict[str, Counter[str]] = {}
        self._frequent: Counter[str] = Counter()
        self._hashes: dict[str, list[Hashes]] = {name: [] for name in HASHED}
        self._contents: dict[str, list[bytes]] = {name: [] for name in HASHED}

    def sample(self, span: SampleSpan, read: Read) -> None:
        """Takes one sample."""
        self.samples += 1
        self.counts["extensions"].update(name[:40] for name in span.members)
        sample = _read(span, read, self._description.captions)
        captions = self._captions(sample)
        image = self._image(sample)
        self.counts["captions per sample"][str(len(captions))] += 1
        self._contents["caption"] += [text.encode() for text in captions]
        if image is not None:
            self._contents["image"].append(_short(image))
        if image is not None and captions:
            self._contents["pair"].append(_short(image) + captions[0].encode())
            self.described += 1
        if len(self._contents["caption"]) > self._LOT:
            self._hash()

    def _captions(self, sample: RawSample) -> list[str]:
        found: list[str] = []
        for name in self._description.captions:
            try:
                found += field_captions(sample, CaptionField(name, lines=self._description.lines))
            except Unusable as problem:
                self.counts["unusable"][problem.reason] += 1
        self._lot += found
        if len(self._lot) >= self._LOT:
            self._take_lot()
        return found

    def _take_lot(self) -> None:
        for text, tokens in zip(self._lot, self._count(self._lot), strict=True):
            self.counts["words"][str(len(text.split()))] += 1
            self.counts["characters"][str(len(text))] += 1
            self.tokens.setdefault(script_of(text), Counter())[str(tokens)] += 1
            if len(text) <= _LISTED:
                self._frequent[text] += 1
        self._lot = []

    def _image(self, sample: RawSample) -> bytes | None:
        counts = self.counts
        try:
            data = image_bytes(sample)
            with opened_image(data, self._description.max_pixels) as image:
                width, height = image.size
                counts["width"][str(width)] += 1
                counts["height"][str(height)] += 1
                counts["short side"][str(min(width, height))] += 1
                counts["aspect"][f"{width / height:.2f}"] += 1
                counts["formats"][str(image.format)] += 1
                counts["modes"][image.mode] += 1
                if image.info.get("exif") and image.getexif().get(_ORIENTATION, 1) not in (0, 1):
                    counts["turned"]["yes"] += 1
        except Unusable as problem:
            counts["unusable"][problem.reason] += 1
            return None
        counts["image bytes"][_rounded(len(data))] += 1
        return data

    def _hash(self) -> None:
        for name, contents in self._contents.items():
            self._hashes[name].append(hashes_of(contents))
            contents.clear()

    def record(self) -> Record:
        """Returns the numbers."""
        self._take_lot()
        self._hash()
        return {
            "samples": self.samples,
            "described": self.described,
            "counts": {name: dict(counts.most_common(_KEPT)) for name, counts in self.counts.items()},
            "tokens": {script: dict(counts) for script, counts in self.tokens.items()},
            "frequent": self._frequent.most_common(_FREQUENT),
            "hashes": {name: to_text(np.concatenate(hashes)) for name, hashes in self._hashes.items()},
        }


def _read(span: SampleSpan, read: Read, captions: tuple[str, ...]) -> RawSample:
    wanted = {*IMAGE_EXTENSIONS, *(name.partition(".")[0] for name in captions)}
    chunk, spans = bytearray(), {}
    for extension, member in span.members.items():
        if extension in wanted:
            spans[extension] = (len(chunk), len(chunk) + member.size)
            chunk += read(member.data, member.size)
    return RawSample(span.key, spans, bytes(chunk))


def _short(image: bytes) -> bytes:
    return hashlib.blake2b(image, digest_size=16).digest()


def _rounded(count: int) -> str:
    """Two digits are enough for a histogram, and bound its length."""
    return f"{float(f'{count:.1e}'):.0f}"
