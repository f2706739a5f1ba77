"""Writers of the two layouts clipkit reads: training shards and CLIP_benchmark evaluation sets.

Both are made of ordinary tar files written by webdataset's TarWriter with a fixed time, owner and member
order, so that the same samples give the same bytes. A shard appears under its name only when it is
complete. Loads no torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import re
import secrets
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipkit.data.engine import Engine
from clipkit.data.shard_folder import MANIFEST_FORMAT, SUMMARIES, begin_shards
from clipkit.types import DataError

Progress = Callable[[int], None]
"""Called with the number of samples written since the last call."""

_MTIME = 946_684_800  # 2000-01-01: any fixed time; 0 makes some unpacking tools warn
_MAX_KEY = 80  # with the extension below the 100 bytes of a ustar name
IMAGE_EXTENSIONS = ("jpg", "png", "webp", "gif", "bmp")
_OWN_KEYS = "give every sample its own key"
TEMPORARY = ".tmp"  # ends the name of a file that is being written
_LEFT = re.compile(r"\.(tar|json|txt)\.[0-9a-f]{8}\.tmp$")  # as `_beside` names them
_SIGNATURES = {
    b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"RIFF": "webp",
    b"GIF87a": "gif", b"GIF89a": "gif", b"BM": "bmp",
}  # fmt: skip
EVALUATION_EXTENSIONS = ("jpg", "png", "webp")  # the ones CLIP_benchmark's reader looks for


@dataclass(frozen=True)
class Sample:
    """One training sample: encoded image, its captions, and further JSON-able fields."""

    key: str
    image: bytes
    extension: str
    captions: tuple[str, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationItem:
    """One evaluation image with either a class index or its captions."""

    image: bytes
    extension: str
    label: int | None = None
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says about one shard."""

    name: str
    samples: int
    bytes: int
    sha256: str


def normalize_extension(extension: str, allowed: Sequence[str] = IMAGE_EXTENSIONS) -> str:
    """Returns the lower-case extension without dot, `jpeg` as `jpg`; DataError for one outside `allowed`."""
    plain = extension.lower().lstrip(".")
    plain = {"jpeg": "jpg", "jpe": "jpg"}.get(plain, plain)
    if plain not in allowed:
        raise DataError(
            f"image extension '{extension}' cannot be stored here",
            f"convert the images to one of {', '.join(allowed)}",
        )
    return plain


def image_extension(content: bytes) -> str | None:
    """Returns the extension that the first bytes of a file call for, None when they are no known image's."""
    for start, extension in _SIGNATURES.items():
        if content.startswith(start) and (extension != "webp" or content[8:12] == b"WEBP"):
            return extension
    return None


def normalize_caption(caption: str) -> str:
    """Returns the caption with every run of white space as one blank.

    CLIP_benchmark joins captions by newlines and reads them with `str.splitlines`, which also splits at
    \\x85, U+2028 and others: without this a caption could become two.
    """
    return " ".join(caption.split())


def write_shard(path: Path, samples: Iterable[Sample], progress: Progress | None = None) -> ShardRecord:
    """Writes one training shard (members KEY.EXT, KEY.txt and, with several captions or fields, KEY.json).

    Returns its record. DataError for a key that tar readers would misread, an empty caption or an empty
    shard.
    """
    return write_members(path, map(training_members, samples), progress)


def write_copied_shard(
    path: Path,
    samples: Iterable[tuple[str, Mapping[str, bytes]]],
    progress: Progress | None = None,
    cure: str = _OWN_KEYS,
) -> ShardRecord:
    """Writes one training shard of (key, members by extension), as `write_members`; returns its record."""
    return write_members(path, ({"__key__": key, **members} for key, members in samples), progress, cure)


def write_train_shards(
    samples: Iterable[Sample], out: Path, *, samples_per_shard: int = 10_000, progress: Progress | None = None
) -> list[ShardRecord]:
    """Writes `samples` in order as out/00000.tar, 00001.tar, ... with sizes.json and manifest.json.

    Returns one record per shard. sizes.json ({name: samples}) is what open_clip reads.
    """
    begin_shards(out, *SUMMARIES)
    records = []
    stream = iter(samples)
    for number in itertools.count():
        first = next(stream, None)
        if first is None:
            break
        part = itertools.chain([first], itertools.islice(stream, samples_per_shard - 1))
        records.append(write_shard(out / shard_name(number), part, progress))
    return finish_train_shards(out, records)


def write_train_parts(
    parts: Sequence[Callable[[], Iterable[Sample]]],
    out: Path,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> list[ShardRecord]:
    """Writes shard i from `parts[i]()`, on `workers` processes: the bytes do not depend on their number.

    Each part travels to a process, so it must pickle. Returns one record per shard.
    """
    begin_shards(out, *SUMMARIES)
    jobs = [(out / shard_name(number), part) for number, part in enumerate(parts)]
    count = None if progress is None else lambda record: progress(record.samples)
    return finish_train_shards(out, list(Engine(workers).map(_write_part, jobs, count)))


def finish_train_shards(
    out: Path, records: Sequence[ShardRecord], job: Mapping[str, Any] | None = None
) -> list[ShardRecord]:
    """Writes sizes.json and manifest.json for `records`, removes later shards of an earlier run and what
    killed writers left, returns the records.

    job: what made the shards, for the manifest.
    """
    _keep_only(out, records)
    manifest = {
        "format": f"{MANIFEST_FORMAT}1",
        **({} if job is None else {"job": job}),
        "samples": sum(record.samples for record in records),
        "shards": [vars(record) for record in records],
    }
    write_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    write_text(out / "sizes.json", json.dumps({record.name: record.samples for record in records}) + "\n")
    return list(records)


def write_evaluation_set(
    items: Iterable[EvaluationItem],
    out: Path,
    *,
    classnames: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    kind: str | None = None,
    split: str = "test",
    max_samples: int = 10_000,
    max_bytes: int = 1_000_000_000,
    progress: Progress | None = None,
) -> list[ShardRecord]:
    """Writes the CLIP_benchmark WebDataset layout into `out` and returns one record per shard.

    With `classnames` a classification set (member `cls`), otherwise a retrieval set (member `txt`, one
    caption per line); `kind` overrides what dataset_type.txt says. Templates use the field {c}.
    """
    folder = out / split
    begin_shards(folder, "nshards.txt")
    num_classes = None if classnames is None else len(classnames)
    stream = _Peekable(evaluation_members(item, number, num_classes) for number, item in enumerate(items))
    records: list[ShardRecord] = []
    while stream.more():
        path = folder / f"{len(records)}.tar"
        records.append(write_members(path, stream.take(max_samples, max_bytes), progress))
    return finish_evaluation_set(out, records, classnames, templates, kind, split)


def finish_evaluation_set(
    out: Path,
    records: Sequence[ShardRecord],
    classnames: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    kind: str | None = None,
    split: str = "test",
) -> list[ShardRecord]:
    """Writes the text files of the layout for shards 0.tar, 1.tar, ... and removes later ones of an earlier
    run and what killed writers left; returns the records. Arguments as in `write_evaluation_set`.
    """
    folder = out / split
    remove_left(out)
    _keep_only(folder, records)
    if classnames is not None:
        write_text(out / "classnames.txt", "".join(f"{normalize_caption(name)}\n" for name in classnames))
        lines = templates if templates is not None else ("a photo of a {c}",)
        write_text(out / "zeroshot_classification_templates.txt", "".join(f"{line}\n" for line in lines))
    write_text(
        out / "dataset_type.txt", f"{kind or ('retrieval' if classnames is None else 'classification')}\n"
    )
    write_text(folder / "nshards.txt", f"{len(records)}\n")
    return list(records)


def shard_name(number: int) -> str:
    """Returns the file name of training shard `number`."""
    return f"{number:05d}.tar"


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file that appears complete or not at all."""
    temporary = _beside(path)
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def _write_part(path: Path, part: Callable[[], Iterable[Sample]]) -> ShardRecord:
    return write_shard(path, part())


def _beside(path: Path) -> Path:
    # Of its own: a job that is started twice by mistake must not write into the file of the other.
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")


def _keep_only(folder: Path, records: Sequence[ShardRecord]) -> None:
    if not sum(record.samples for record in records):
        raise DataError(f"{folder}: no samples to write", "check the input table and the image root")
    names = {record.name for record in records}
    for old in folder.glob("*.tar"):
        if old.name not in names and old.stem.isdecimal():
            old.unlink()
    remove_left(folder)


def remove_left(folder: Path) -> None:
    """Removes the files that killed writers of this module had begun in `folder`: nothing replaces them."""
    for left in folder.iterdir():
        if _LEFT.search(left.name):
            left.unlink(missing_ok=True)


def _tar_writer() -> Any:
    """Returns webdataset's TarWriter class without running webdataset/__init__, which imports torch
    (seconds).
    """
    package = sys.modules.get("_clipkit_webdataset")
    if package is None:
        spec = importlib.util.find_spec("webdataset")
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError("webdataset is not installed")
        package = types.ModuleType("_clipkit_webdataset")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["_clipkit_webdataset"] = package
    return importlib.import_module("_clipkit_webdataset.writer").TarWriter


def write_members(
    path: Path,
    members: Iterable[dict[str, Any]],
    progress: Progress | None = None,
    cure: str = _OWN_KEYS,
) -> ShardRecord:
    """Writes one tar of samples, given as their members by extension with the key as __key__.

    Returns its record. DataError, with `cure`, for a key that occurs twice.
    """
    temporary = _beside(path)
    writer_class = _tar_writer()
    samples = 0
    seen: set[str] = set()
    try:
        with temporary.open("wb") as stream:
            with writer_class(
                stream,
                encoder=False,
                mtime=_MTIME,
                user="clipkit",
                group="clipkit",
                mode=0o644,
                keep_meta=True,  # extensions that begin with _ too: none is dropped
            ) as writer:
                for sample in members:
                    if sample["__key__"] in seen:
                        raise DataError(f"{path}: key '{sample['__key__']}' occurs twice", cure)
                    seen.add(sample["__key__"])
                    writer.write(sample)
                    samples += 1
                    if progress is not None:
                        progress(1)
            stream.flush()
            os.fsync(stream.fileno())
        with temporary.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        size = temporary.stat().st_size
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return ShardRecord(path.name, samples, size, digest)


def training_members(sample: Sample) -> dict[str, Any]:
    """Returns the members of one training sample by extension, its key as __key__; raises DataError."""
    # Readers cut a member name at its first dot: `a.v1.jpg` would be sample `a` without an image.
    if (
        not sample.key
        or "." in sample.key
        or len(sample.key.encode()) > _MAX_KEY
        or sample.key.startswith("/")
    ):
        raise DataError(
            f"sample key '{sample.key}' cannot be stored", f"use 1 to {_MAX_KEY} bytes without dots for keys"
        )
    captions = [normalize_caption(caption) for caption in sample.captions]
    if not captions or not all(captions):
        raise DataError(
            f"sample '{sample.key}' has an empty caption", "remove the row or fill in its caption"
        )
    members: dict[str, Any] = {
        "__key__": sample.key,
        normalize_extension(sample.extension): sample.image,
        "txt": captions[0].encode(),
    }
    if len(captions) > 1 or sample.fields:
        document = {"captions": captions, **sample.fields}
        members["json"] = json.dumps(document, ensure_ascii=False, sort_keys=True).encode()
    return members


def evaluation_members(item: EvaluationItem, number: int, num_classes: int | None) -> dict[str, Any]:
    """Returns the members of one evaluation image by extension, its key as __key__; raises DataError.

    num_classes: of a classification set; None for a retrieval set.
    """
    extension = normalize_extension(item.extension, EVALUATION_EXTENSIONS)
    members: dict[str, Any] = {"__key__": f"s{number:07d}", extension: item.image}
    if num_classes is not None:
        if item.label is None or not 0 <= item.label < num_classes:
            raise DataError(
                f"evaluation image {number} has label {item.label}, outside 0..{num_classes - 1}",
                "check the label column against classnames.txt",
            )
        members["cls"] = str(item.label).encode()
    else:
        captions = [normalize_caption(caption) for caption in item.captions]
        if not captions or not all(captions):
            raise DataError(
                f"evaluation image {number} has an empty caption", "remove it or fill in its caption"
            )
        members["txt"] = "\n".join(captions).encode()
    return members


class _Peekable:
    """Members of samples, handed out in portions of at most `samples` samples and about `size` bytes."""

    def __init__(self, stream: Iterator[dict[str, Any]]) -> None:
        self._stream = stream
        self._next = next(stream, None)

    def more(self) -> bool:
        return self._next is not None

    def take(self, samples: int, size: int) -> Iterator[dict[str, Any]]:
        count = total = 0
        while self._next is not None and count < samples and (count == 0 or total < size):
            members = self._next
            self._next = next(self._stream, None)
            count += 1
            total += sum(len(value) for name, value in members.items() if name != "__key__")
            yield members
