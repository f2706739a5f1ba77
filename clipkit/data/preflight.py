"""A look at a few samples before anything is built: what members and fields there are, and which are used.

A field that no sample holds would otherwise show as a run that rejects everything, hours after it was queued.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from clipkit.data.captions import DRAWN, label_source
from clipkit.data.options import DEFAULT_STORAGE, CaptionField, Source, Storage
from clipkit.data.sample import MAX_CAPTION_BYTES, MAX_JSON_BYTES, Absent, RawSample, Unusable, field_value
from clipkit.data.source import is_remote, needs_stream
from clipkit.data.tar_format import IMAGE_EXTENSIONS
from clipkit.data.walked import walked_samples
from clipkit.types import ConfigError, DataError, Needs

# (samples, shards) of the first look, and of the second if something that is needed was in none of them.
_FIRST, _SECOND = (64, 16), (1024, 128)
# A shard behind a request or a command costs far more than one on disk.
_DISTANT_SHARDS = 4
_BLOCK = 1 << 18
_DEPTH, _MOST_FIELDS = 3, 64  # of a JSON member
_LONGEST = 64
_SHOWN = 16
_HASHES = ("md5", "sha256", "sha512")


@dataclass(frozen=True)
class Wanted:
    """What the samples of a source must hold.

    captions  the fields of the caption; () where nothing reads it
    fields    further fields -> who reads them, for messages
    optional  those of `fields` that a sample may lack
    """

    image: bool = True
    captions: tuple[CaptionField, ...] = (CaptionField(),)
    missing: str = "fallback"
    fields: dict[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()

    @classmethod
    def of(cls, needs: Needs, source: Source) -> Wanted:
        """Returns what the declared views, labels and stored vectors read of the samples of a source."""
        fields: dict[str, str] = {}
        required = set[str]()
        texts = needs.of_tower("text")
        for view in texts:
            if view.field is not None:
                fields.setdefault(view.field, f"the view {view.name} of an objective")
                required |= set() if view.optional else {view.field}
        drawn = any(view.field is None for view in texts)
        for label in needs.labels:
            read = label_source(label)
            drawn |= read == DRAWN
            if read != DRAWN:
                name = label if read is None or read.field is None else read.field
                fields.setdefault(name, "the label of an objective")
                required.add(name)
        for name in needs.stored:
            fields.setdefault(name.lower(), "a stored vector of an objective")
            required.add(name.lower())
        return cls(
            image=bool(needs.of_tower("image")),
            captions=source.captions if drawn else (),
            missing=source.missing,
            fields=fields,
            optional=frozenset(fields.keys() - required),
        )

    def lacking(self, held: frozenset[str]) -> bool:
        """Returns whether a sample that holds these names certainly cannot be used."""
        captions = [entry.field in held for entry in self.captions]
        return (
            (self.image and not held & set(IMAGE_EXTENSIONS))
            or (bool(captions) and not any(captions))
            or any(name not in held for name in self.fields if name not in self.optional)
        )


@dataclass
class Look:
    """What the samples held. Names are extensions of members ("jpg") and paths into JSON ("json.caption").

    present   name -> samples that hold something there
    texts     names that held text, or a list of it
    complete  samples that lack nothing
    unread    shards that could not be read; the index says why
    """

    samples: int = 0
    shards: int = 0
    complete: int = 0
    unread: int = 0
    present: Counter[str] = field(default_factory=Counter)
    texts: set[str] = field(default_factory=set)
    members: dict[frozenset[str], str] = field(default_factory=dict)

    def add(self, sample: RawSample, wanted: Wanted) -> None:
        """Counts one sample."""
        held, texts = _names(sample)
        # The names above are those of the usual places; a path may also lead deeper, or into a list.
        held |= {name for name in (*wanted.fields, *_fields(wanted)) if holds_field(sample, name)}
        self.samples += 1
        self.complete += not wanted.lacking(frozenset(held))
        self.present.update(held)
        self.texts |= texts
        self.members.setdefault(frozenset(sample.members), sample.key)

    def shares(self) -> str:
        """Returns "jpg 100 %, txt 98 %, ...", the most frequent first, whole members before fields."""
        ordered = sorted(self.present, key=lambda name: (-self.present[name], "." in name, name))
        parts = [f"{name} {_percent(self.present[name], self.samples)}" for name in ordered[:_SHOWN]]
        more = [f"and {len(ordered) - _SHOWN} more"] if len(ordered) > _SHOWN else []
        return ", ".join(parts + more) or "nothing"

    @property
    def seen(self) -> str:
        """Returns "64 samples of 16 shards"."""
        samples = "sample" if self.samples == 1 else "samples"
        return f"{self.samples:,} {samples} of {self.shards} {'shard' if self.shards == 1 else 'shards'}"


def look(shards: Sequence[str], wanted: Wanted, storage: Storage = DEFAULT_STORAGE) -> Look:
    """Returns what some first samples of shards all over the list hold.

    Looks at more of them before it concludes that something is in none. Shards that cannot be read are
    passed over, for the index says what is wrong with them.
    """
    found = Look()
    for samples, spread in (_FIRST, _SECOND):
        found = _look(shards, wanted, storage, samples, spread)
        if not any(_absences(found, wanted)) and (found.complete or not found.samples):
            break
    return found


def check(found: Look, wanted: Wanted, key: str = "data.train.0") -> None:
    """Raises ConfigError for a field that no sample held, DataError where none held all that is needed.

    key: of the source, for messages.
    """
    if not found.samples:
        return
    for name, reader in _absences(found, wanted):
        cure = f"fields that hold text: {', '.join(sorted(found.texts)) or 'none'}"
        near = nearest_field(name, found.texts)
        if name == "image":
            cure = f"images are members called {', '.join(IMAGE_EXTENSIONS)}: write the shards again"
        elif reader == "captions":
            reader = f"{key}.captions"
            cure = (
                f"did you mean {near}? set {key}.captions to a field that is there; {cure}" if near else cure
            )
        else:
            cure = f"did you mean {near}? {cure}" if near else cure
        raise ConfigError(
            f"{reader} reads {name}, which none of {found.seen} holds; they hold {found.shares()}", cure
        )
    if not found.complete:
        kinds = sorted(found.members.items(), key=lambda entry: entry[1])[:3]
        shown = "; ".join(f"{key!r} has {', '.join(sorted(names))}" for names, key in kinds)
        raise DataError(
            f"none of {found.seen} holds all that is needed together: {shown}",
            "the members of one sample share their name up to the first dot: write the shards again so "
            "(clipkit data make-shards)",
        )


def describe(found: Look, wanted: Wanted) -> list[str]:
    """Returns the lines of a banner: what the samples hold, and what of it is used."""
    if not found.samples:
        return []
    unread = f", {found.unread} shards could not be read" if found.unread else ""
    used = [_caption(entry, len(wanted.captions) > 1) for entry in wanted.captions]
    if len(used) > 1:
        used[-1] += f" (missing: {wanted.missing})"
    parts = ["images"] * wanted.image + [f"captions from {', '.join(used)}"] * bool(used)
    parts += [f"{name} for {reader}" for name, reader in wanted.fields.items()]
    lacking = found.samples - found.complete
    short = f"; {lacking} of them lack something that is needed" if lacking else ""
    return [f"members: {found.shares()} ({found.seen}{unread}{short}); used: {', '.join(parts) or 'nothing'}"]


def _caption(entry: CaptionField, weighted: bool) -> str:
    notes = [f"weight {entry.weight:g}"] * weighted + ["one line of it"] * entry.lines
    return entry.field + (f" ({', '.join(notes)})" if notes else "")


def _fields(wanted: Wanted) -> Iterator[str]:
    return (entry.field for entry in wanted.captions)


def _absences(found: Look, wanted: Wanted) -> Iterator[tuple[str, str]]:
    """What is needed and in no sample -> who reads it."""
    if not found.samples:
        return
    if wanted.image and not any(found.present[name] for name in IMAGE_EXTENSIONS):
        yield "image", "training"
    yield from ((name, "captions") for name in _fields(wanted) if not found.present[name])
    yield from ((name, reader) for name, reader in wanted.fields.items() if not found.present[name])


def fields_in(shards: Sequence[str], storage: Storage = DEFAULT_STORAGE) -> set[str]:
    """Returns the names, as in Look, of what some first samples hold; for messages."""
    return set(_look(shards, Wanted(image=False, captions=()), storage, *_FIRST).present)


def nearest_field(name: str, names: Iterable[str]) -> str | None:
    """Returns the one of `names` that `name` may mean, None when none is like it."""
    known = sorted(names)
    # "json.caption" for "caption" too: the last part of a path is what people remember.
    short = {path.rpartition(".")[2]: path for path in reversed(known)}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    near += difflib.get_close_matches(name.rpartition(".")[2], short, n=1, cutoff=0.6)
    return short.get(near[0], near[0]) if near else None


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.0f} %" if share in (0, 100) or 1 <= share <= 99 else f"{share:.1f} %"


def _look(shards: Sequence[str], wanted: Wanted, storage: Storage, samples: int, spread: int) -> Look:
    found = Look()
    distant = any(is_remote(shard) or needs_stream(shard) for shard in shards)
    count = min(len(shards), _DISTANT_SHARDS if distant else spread)
    for number in range(count):
        shard = shards[number * (len(shards) - 1) // max(1, count - 1)]
        quota = samples * (number + 1) // count - samples * number // count
        try:
            before = found.samples
            for sample in islice(_samples(shard, storage), quota):
                found.add(sample, wanted)
            found.shards += found.samples > before
        except (DataError, OSError):
            found.unread += 1
    return found


def _samples(shard: str, storage: Storage) -> Iterator[RawSample]:
    """Yields the samples of a shard from its beginning, reading no further than they are asked for."""
    if needs_stream(shard):
        from clipkit.data.stream import raw_samples

        with closing(raw_samples([shard], storage)) as streamed:
            yield from streamed
        return
    yield from walked_samples(shard, storage, _BLOCK)


def _names(sample: RawSample) -> tuple[set[str], set[str]]:
    """The names that hold something in a sample, and those among them that hold text."""
    held, texts = set[str](), set[str]()
    for extension, (begin, end) in sample.members.items():
        data = sample.chunk[begin:end]
        if extension == "json" and len(data) <= MAX_JSON_BYTES:
            for name, value in islice(_leaves(_parsed(data), extension, _DEPTH), _MOST_FIELDS):
                if _holds(value):
                    held.add(name)
                    if _is_text(value) and not name.endswith(_HASHES):
                        texts.add(name)
        elif data.strip():
            held.add(extension)
            if (
                extension not in IMAGE_EXTENSIONS
                and len(data) <= MAX_CAPTION_BYTES
                and _is_text(_decoded(data))
            ):
                texts.add(extension)
    return held, texts


def _parsed(data: bytes) -> Any:
    # Damage is counted where samples are read; here it is a member that holds nothing.
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return ""


def _leaves(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and depth:
        for name, entry in value.items():
            # A path is split at its dots, and a longer name is none that anyone would write.
            if "." not in name and len(name) <= _LONGEST:
                yield from _leaves(entry, f"{path}.{name}", depth - 1)
    else:
        yield path, value


def holds_field(sample: RawSample, name: str) -> bool:
    """Returns whether something stands at a field: no null, no blank text, no empty list."""
    try:
        return _holds(field_value(sample, name))
    except Absent:
        return False
    except Unusable:
        # There, if damaged: a matter of samples, which are counted when they are read.
        return True


def _holds(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, list):
        return any(map(_holds, value))
    return value is not None and value != {}


def _is_text(value: Any) -> bool:
    """Whether it may be a caption: text with a letter in it, or a list of that."""
    if isinstance(value, list):
        return bool(value) and _is_text(value[0])
    return isinstance(value, str) and any(map(str.isalpha, value)) and "://" not in value[:16]
