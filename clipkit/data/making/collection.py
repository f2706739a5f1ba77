"""Images with what is said about them, listed on disk: however many there are, little of it is in memory."""

from __future__ import annotations

import hashlib
import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np

from clipkit.types import ConfigError, DataError

LIST = "captions"  # the name in the JSON member under which the captions of a sample are listed
_STRIDE = 64  # entries between two known offsets
_REPORTED = 10_000  # entries between two words of progress


class Entry(NamedTuple):
    """One image and what is said about it; its bytes are read when its shard is written.

    row       number in the input, from 0 (people are told the next one); of rows that were put together, the
              first one's
    image     what `Images.read` knows the image by
    captions  as they stand in the input
    label     class number, None where there are no classes
    fields    further JSON-able values
    problem   (reason, detail) of an entry that cannot become a sample
    """

    row: int
    image: str
    captions: tuple[str, ...] = ()
    label: int | None = None
    fields: Mapping[str, Any] = {}
    problem: tuple[str, str] | None = None


class Images(Protocol):
    """Where the images of a collection lie. Picklable; read in worker processes."""

    def read(self, image: str, size: int = -1) -> bytes:
        """Returns the first `size` bytes of an image (all by default); raises one of tables.UNREADABLE."""
        ...


@dataclass(frozen=True)
class Reading:
    """How an input is read. None: whatever is found.

    images     folder or zip file of the images
    image_key  column of the images
    captions   columns of the captions, the first one's first
    keep       columns stored with each sample; None: of a table all others, of a folder of pairs the names
    splits     parts of an input that has several, all of them by default
    group      rows of the same image become one sample with several captions
    classnames  file of class names, for labelled images that bring none
    templates   captions of labelled images, {c} or {} stands for the class name
    usual_split     read of an input that has several when `splits` says nothing
    labels_first    what has labels and captions is read for its labels
    """

    images: Path | None = None
    image_key: str | None = None
    captions: tuple[str, ...] = ()
    keep: tuple[str, ...] | None = None
    splits: tuple[str, ...] = ()
    group: bool | None = None
    classnames: Path | None = None
    templates: tuple[str, ...] | None = None
    usual_split: str | None = None
    labels_first: bool = False

    def __post_init__(self) -> None:
        if LIST in (self.keep or ()):
            raise ConfigError(
                f"a field cannot be kept under the name '{LIST}', where the JSON member has the captions",
                "leave it out of --keep, or name it as a caption column",
            )


def refuse_splits(source: object, reading: Reading) -> None:
    """Raises ConfigError when a split is asked for where there are none."""
    if reading.splits:
        raise ConfigError(f"{source}: has no splits", "leave --split out")


@dataclass(frozen=True)
class Found:
    """What a reader found: the entries are streamed once, in order.

    kind        the name of the layout
    fields      names that can be kept or hold captions
    kept        those of them that are stored with each sample
    used        what was taken for what, in words
    grouped     whether rows of one image belong together unless the reading says otherwise
    classnames  one name per class, None where there are no classes
    passed_over  files that nobody is meant to see, by kind; counted while the entries are listed
    """

    kind: str
    images: Images
    entries: Callable[[], Iterable[Entry]]
    fields: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    used: str = ""
    grouped: bool = False
    classnames: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    passed_over: Counter[str] = field(default_factory=Counter)

    def describe_passed_over(self) -> str:
        """Returns what was passed over in words, "" for nothing."""
        found = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.passed_over.items()))
        return f"passed over: {found}" if found else ""


class Listing:
    """Entries in a file without a name, in order: it vanishes with this process, however that ends.

    repeated  entries whose image is that of the entry before
    """

    def __init__(self, folder: Path | None) -> None:
        try:
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, prefix=".clipkit-")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(
                f"{folder or tempfile.gettempdir()}: cannot be written ({error.strerror})",
                "choose a folder that you may write to",
            ) from error
        self._offsets = array("q")
        self._hash = hashlib.blake2b(digest_size=16)
        self._size = self._length = self.repeated = 0

    def __len__(self) -> int:
        return self._length

    def __del__(self) -> None:
        if "_file" in vars(self):
            self.close()

    @property
    def digest(self) -> str:
        """The hash of all entries."""
        return self._hash.hexdigest()

    def extend(
        self,
        entries: Iterable[Entry],
        on_entry: Callable[[Entry, int], None] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Appends entries; `on_entry` gets each with the byte where it is written."""
        last = None
        for entry in entries:
            line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
            if self._length % _STRIDE == 0:
                self._offsets.append(self._size)
            if on_entry is not None:
                on_entry(entry, self._size)
            self._file.write(line)
            self._hash.update(line)
            self._size += len(line)
            self._length += 1
            if progress is not None and self._length % _REPORTED == 0:
                progress(_REPORTED)
            self.repeated += entry.image == last and entry.problem is None
            last = entry.image
        self._file.flush()

    def entries(self, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """Yields entries start..stop. One iteration at a time."""
        stop = self._length if stop is None else min(stop, self._length)
        if start >= stop:
            return
        self._file.seek(self._offsets[start // _STRIDE])
        for number in range(start - start % _STRIDE, stop):
            line = self._file.readline()
            if number >= start:
                yield _entry(line)

    def at(self, offset: int) -> Entry:
        """Returns the entry that is written at a byte."""
        self._file.seek(offset)
        return _entry(self._file.readline())

    def close(self) -> None:
        """Gives the file back."""
        self._file.close()


def _entry(line: bytes) -> Entry:
    row, image, captions, label, fields, problem = json.loads(line.decode("utf-8", "surrogatepass"))
    return Entry(row, image, tuple(captions), label, fields, None if problem is None else tuple(problem))


def list_entries(
    entries: Iterable[Entry],
    folder: Path | None,
    group: bool,
    progress: Callable[[int], None] | None = None,
) -> Listing:
    """Returns the listing of `entries`; group: one entry per image, in the order of first appearance.

    Grouping takes about 60 bytes of memory per entry while it lasts. The fields of an image's first row stay.
    """
    listing = Listing(folder)
    if not group:
        listing.extend(entries, None, progress)
        return listing
    offsets = array("q")
    hashes = bytearray()

    def note(entry: Entry, offset: int) -> None:
        # Broken rows stay on their own: their images may have no name at all.
        name = entry.image if entry.problem is None else f"\0{offset}"
        hashes.extend(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest())
        offsets.append(offset)

    listing.extend(entries, note, progress)
    if not offsets:
        return listing
    keys = np.frombuffer(bytes(hashes), dtype=[("a", "<u8"), ("b", "<u8")])
    order = np.lexsort((np.arange(len(keys)), keys["b"], keys["a"]))
    begins = np.flatnonzero(np.concatenate([[True], keys[order][1:] != keys[order][:-1]]))
    if len(begins) == len(order):
        return listing
    ends = np.append(begins[1:], len(order))
    merged = Listing(folder)
    by_appearance = np.argsort(order[begins], kind="stable")

    def groups() -> Iterator[Entry]:
        for number in by_appearance:
            rows = [listing.at(offsets[row]) for row in order[begins[number] : ends[number]]]
            captions = tuple(caption for row in rows for caption in row.captions)
            yield rows[0]._replace(captions=captions)

    merged.extend(groups())
    listing.close()
    return merged


@dataclass(frozen=True)
class Collection:
    """What `open_collection` returns: the entries of an input, and where their images lie."""

    source: str
    found: Found
    reading: Reading
    listing: Listing = field(repr=False)

    def __len__(self) -> int:
        return len(self.listing)

    @property
    def kind(self) -> str:
        """The name of the layout."""
        return self.found.kind

    @property
    def fields(self) -> tuple[str, ...]:
        """Names that can be kept or hold captions."""
        return self.found.fields

    @property
    def images(self) -> Images:
        """Where the images lie."""
        return self.found.images

    @property
    def classnames(self) -> tuple[str, ...] | None:
        """One name per class, None where there are no classes."""
        return self.found.classnames

    def part(self, start: int, stop: int) -> list[Entry]:
        """Returns entries start..stop: what a worker needs, with `images`, to write them."""
        return list(self.listing.entries(start, stop))

    def close(self) -> None:
        """Gives the listing's disk space back; it goes with the process anyway."""
        self.listing.close()


def collect(
    source: str,
    found: Found,
    reading: Reading,
    folder: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Collection:
    """Returns the collection of what a reader found; the listing lies in `folder`.

    progress: told of further entries as they are listed. Raises DataError when there are no entries.
    """
    group = found.grouped if reading.group is None else reading.group
    listing = list_entries(found.entries(), folder, group, progress)
    if not len(listing):
        listing.close()
        raise DataError(f"{source}: no rows", "add one row per image or caption")
    return Collection(source, found, reading, listing)
