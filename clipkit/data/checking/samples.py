"""The rules for one sample: what training or evaluation rejects it for, and what is worth knowing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from clipkit.data.sample import (
    DECODE_ERRORS,
    MAX_CAPTION_BYTES,
    MAX_JSON_BYTES,
    MAX_PIXELS,
    RawSample,
    Unusable,
    as_rgb,
    caption,
    image_bytes,
    opened_image,
)
from clipkit.data.scan import SampleSpan
from clipkit.data.shards import EVALUATION_EXTENSIONS
from clipkit.data.tar_format import IMAGE_EXTENSIONS, Member, Read
from clipkit.data.targets import npy_vector

MAX_IMAGE_BYTES = 1 << 30
MAX_TEXT_BYTES = 64 << 20
MUCH_METADATA = 48 << 10  # bytes of EXIF; a thumbnail from a camera stays below
_LABELS = ("cls", "npy")
_BOM = b"\xef\xbb\xbf"
_READABLE = (*IMAGE_EXTENSIONS, "txt", "json", *_LABELS)
# CLIP_benchmark looks for these and no others.
_EVALUATION_IMAGES = (*EVALUATION_EXTENSIONS, "jpeg")


class Problem(NamedTuple):
    """What is wrong with one member of a sample."""

    kind: str
    detail: str
    member: Member
    error: bool = True


@dataclass(frozen=True)
class SampleRules:
    """What every sample is held to.

    captions     fields that must hold a caption
    max_pixels   as data.max_pixels
    decode       images are decoded and texts read; without it only names and headers are looked at
    evaluation   CLIP_benchmark layout: a label (cls, npy) may stand in place of a caption
    classes      labels there may be, None: not known
    """

    captions: tuple[str, ...] = ("txt",)
    max_pixels: int = MAX_PIXELS
    decode: bool = True
    evaluation: bool = False
    classes: int | None = None

    def problems(self, span: SampleSpan, read: Read) -> Iterator[Problem]:
        """Yields what is wrong with a sample; no error among it: training takes it."""
        yield from _names(span)
        yield from self._missing(span)
        if not self.decode:
            return
        sample, large = self._read(span, read)
        for member in large:
            yield Problem("too large", f"{member.size} bytes", member)
        yield from self._image_problems(span, sample)
        labels = [extension for extension in _LABELS if extension in sample.members]
        if self.evaluation and labels:
            yield from self._label_problems(span, sample, labels[0])
        else:
            for field in self.captions:
                yield from self._caption_problems(span, sample, field)
        yield from _json_problems(span, sample)

    def _missing(self, span: SampleSpan) -> Iterator[Problem]:
        """By names only, so that --fast finds it."""
        first = next(iter(span.members.values()))
        there = ", ".join(span.members)[:200]
        if not span.members.keys() & set(IMAGE_EXTENSIONS):
            yield Problem("missing image", f"members: {there}", first)
        elif self.evaluation and not span.members.keys() & set(_EVALUATION_IMAGES):
            yield Problem("missing image", f"CLIP_benchmark reads none of {there}", first)
        if self.evaluation and span.members.keys() & set(_LABELS):
            return
        for field in self.captions:
            extension = field.partition(".")[0]
            if extension not in span.members:
                labelled = "; a label set is read in CLIP_benchmark layout only, beside its nshards.txt"
                more = labelled if span.members.keys() & set(_LABELS) else ""
                yield Problem("missing caption", f"no .{extension}; members: {there}{more}", first)

    def _read(self, span: SampleSpan, read: Read) -> tuple[RawSample, list[Member]]:
        """The members that are looked at, as training sees them, without those too large to hold."""
        wanted = {*_READABLE, *(field.partition(".")[0] for field in self.captions)}
        chunk, spans, large = bytearray(), {}, []
        for extension, member in span.members.items():
            if extension not in wanted:
                continue
            if member.size > (MAX_IMAGE_BYTES if extension in IMAGE_EXTENSIONS else MAX_TEXT_BYTES):
                large.append(member)
                continue
            begin = len(chunk)
            chunk += read(member.data, member.size)
            spans[extension] = (begin, len(chunk))
        return RawSample(span.key, spans, bytes(chunk)), large

    def _image_problems(self, span: SampleSpan, sample: RawSample) -> Iterator[Problem]:
        extension = next((name for name in IMAGE_EXTENSIONS if name in sample.members), None)
        if extension is None:
            return
        member = span.members[extension]
        try:
            data = image_bytes(sample)
            with opened_image(data, self.max_pixels) as image:
                exif = len(image.info.get("exif") or b"")
                as_rgb(image)
                frames = _has_frames(image)
        except Unusable as problem:
            yield Problem(problem.reason, problem.detail, member)
            return
        if frames:
            yield Problem("several frames", f"{len(data)} bytes", member, error=False)
        if exif >= MUCH_METADATA:
            yield Problem(
                "much metadata", f"{exif} bytes of EXIF in an image of {len(data)}", member, error=False
            )

    def _caption_problems(self, span: SampleSpan, sample: RawSample, field: str) -> Iterator[Problem]:
        extension = field.partition(".")[0]
        if extension not in sample.members:
            return
        member = span.members[extension]
        try:
            text = caption(sample, field)
        except Unusable as problem:
            yield Problem(problem.reason, problem.detail, member)
            return
        if (sample.member(extension) or b"").startswith(_BOM):
            yield Problem("byte-order mark", f"before {text[:40]!r}", member, error=False)
        if self.evaluation and extension == "txt":
            lines = len(text.split("\n"))
            if len(text.splitlines()) != lines:
                detail = f"{lines} lines, {len(text.splitlines())} for str.splitlines"
                yield Problem("phantom captions", detail, member, error=False)

    def _label_problems(self, span: SampleSpan, sample: RawSample, extension: str) -> Iterator[Problem]:
        data = sample.member(extension) or b""
        problem = (
            _class_problem(data, self.classes) if extension == "cls" else _vector_problem(data, self.classes)
        )
        if problem:
            yield Problem("wrong label", problem, span.members[extension])


def _names(span: SampleSpan) -> Iterator[Problem]:
    for extension, member in span.members.items():
        if not member.name.endswith(extension):
            yield Problem("upper-case extension", f"read as .{extension}", member, error=False)


def _has_frames(image: object) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except DECODE_ERRORS:
        # Training never looks at the frame that is damaged.
        return True


def _json_problems(span: SampleSpan, sample: RawSample) -> Iterator[Problem]:
    data = sample.member("json")
    if data is None:
        return
    member = span.members["json"]
    if len(data) > MAX_JSON_BYTES:
        yield Problem("bad JSON", f"{len(data)} bytes, more than {MAX_JSON_BYTES} are not read", member)
        return
    try:
        json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        yield Problem("bad JSON", f"{type(error).__name__}: {error}"[:200], member)


def _class_problem(data: bytes, classes: int | None) -> str:
    try:
        label = int(data[:MAX_CAPTION_BYTES].removeprefix(_BOM).decode("ascii").strip())
    except ValueError:
        return f"{data[:40]!r} is no number"
    if label < 0 or (classes is not None and label >= classes):
        return f"class {label} of {classes if classes is not None else 'labels from 0'}"
    return ""


def _vector_problem(data: bytes, classes: int | None) -> str:
    try:
        values = npy_vector(data, ".npy", kinds="biuf")
    except Unusable as problem:
        return problem.detail
    if not np.isin(values, (0, 1)).all():
        return "values other than 0 and 1"
    if classes is not None and len(values) != classes:
        return f"{len(values)} values for {classes} classes"
    return ""
