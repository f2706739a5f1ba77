"""One entry becomes the members of a sample, or a reject that is counted and written down."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from clipkit.data.making.collection import Entry, Images
from clipkit.data.making.folders import PairFiles
from clipkit.data.making.images import MAX_IMAGE_BYTES, ImageRules, Prepared
from clipkit.data.sample import MAX_CAPTION_BYTES, MAX_JSON_BYTES, Absent, Unusable, checked_caption
from clipkit.data.shards import (
    EVALUATION_EXTENSIONS,
    EvaluationItem,
    Sample,
    evaluation_members,
    normalize_caption,
    training_members,
)
from clipkit.data.tables import UNREADABLE, RowReject


@dataclass(frozen=True)
class Layout:
    """What is written: training samples, or evaluation images with a class or with captions."""

    train: bool = True
    num_classes: int | None = None


@dataclass
class Tally:
    """What became of the entries of one part."""

    rejects: list[RowReject] = field(default_factory=list)
    rotated: int = 0
    encoded: int = 0

    def outcome(self, rows: int) -> dict[str, Any]:
        """Returns it JSON-able."""
        rejects = [vars(reject) for reject in self.rejects]
        return {"rows": rows, "rejects": rejects, "rotated": self.rotated, "encoded": self.encoded}


def usable(
    entries: Iterable[Entry], first: int, layout: Layout, images: Images, rules: ImageRules, tally: Tally
) -> Iterator[dict[str, Any]]:
    """Yields the members of the usable entries in order; the others go to the tally.

    first: number of the first entry in its collection.
    """
    for number, entry in enumerate(entries, first):
        try:
            members, prepared = _members(entry, number, layout, images, rules)
        except Unusable as problem:
            image, detail = map(_writable, (entry.image, problem.detail))
            tally.rejects.append(RowReject(entry.row + 1, image, problem.reason, detail))
            continue
        tally.rotated += prepared.rotated
        tally.encoded += prepared.encoded
        yield members


def _writable(text: str) -> str:
    # Names of files need not be UTF-8, and texts from JSON can hold half a surrogate pair.
    return text.encode("utf-8", "backslashreplace").decode()


def _members(
    entry: Entry, number: int, layout: Layout, images: Images, rules: ImageRules
) -> tuple[dict[str, Any], Prepared]:
    if entry.problem is not None:
        raise Unusable(*entry.problem)
    captions = () if layout.num_classes is not None else _captions(entry, images)
    prepared = rules.prepare(_content(entry.image, images))
    if layout.train:
        sample = Sample(f"{entry.row:09d}", prepared.content, prepared.extension, captions, entry.fields)
        try:
            members = training_members(sample)
        except UnicodeEncodeError as error:
            raise Unusable("fields are not UTF-8", str(error)) from None
        if len(members.get("json", b"")) > MAX_JSON_BYTES:
            raise Unusable("fields too long", f"{len(members['json'])} bytes of JSON")
        return members, prepared
    if prepared.extension not in EVALUATION_EXTENSIONS:
        raise Unusable(
            "image format not read", f"{prepared.extension} in CLIP_benchmark layout; pass --format png"
        )
    item = EvaluationItem(prepared.content, prepared.extension, entry.label, captions)
    return evaluation_members(item, number, layout.num_classes), prepared


def _captions(entry: Entry, images: Images) -> tuple[str, ...]:
    """Returns the captions that hold something; Unusable without one, or for one that is no clean text."""
    try:
        texts = images.captions(entry) if isinstance(images, PairFiles) else entry.captions
    except UnicodeDecodeError as error:
        raise Unusable("caption is not UTF-8", str(error)) from None
    except OSError as error:
        raise Unusable("unreadable caption", error.strerror or str(error)) from None
    captions = []
    for text in texts:
        try:
            captions.append(checked_caption(normalize_caption(text)))
        except Absent:
            continue
        if len(captions[-1].encode()) > MAX_CAPTION_BYTES:
            raise Unusable("caption too long", f"{len(captions[-1])} characters")
    if not captions:
        raise Unusable("empty caption", "")
    return tuple(captions)


def _content(image: str, images: Images) -> bytes:
    try:
        return images.read(image, MAX_IMAGE_BYTES + 1)
    except (FileNotFoundError, KeyError, NotADirectoryError):
        raise Unusable("missing image", "no such file") from None
    except UNREADABLE as error:
        detail = getattr(error, "strerror", None) or " ".join(f"{type(error).__name__} {error}".split())
        raise Unusable("unreadable image", detail[:200]) from None
