"""Which caption a slot gets: one of several fields by weight, and one entry of a field that holds several.

One caption is drawn per slot, a pure function of (seed, epoch, slot). All views and labels that name no field
of their own mean that one: a dropout view is the same caption again, an edited view an edit of it, and equal
labels are equal captions as they were drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from clipkit.data.options import CaptionField
from clipkit.data.order import hash_key
from clipkit.data.sample import Absent, RawSample, caption, caption_entries, checked_caption

COUNTED = "captions"
FELL_BACK = "captions_fallback"
CAPTION_LABEL = "caption"


class CaptionSource(NamedTuple):
    """Which caption of a sample is meant.

    field None: the caption drawn for its slot; entry n: the n-th one after it in the same field.
    Otherwise entry: of the lines or list of that field, None: the whole.
    """

    field: str | None = None
    entry: int | None = None


DRAWN = CaptionSource()


def label_source(label: str) -> CaptionSource | None:
    """Returns the caption whose equality makes the label: the drawn one for "caption", that of FIELD for
    "caption:FIELD"; None for labels that are fields themselves.
    """
    kind, _, field = label.partition(":")
    if kind != CAPTION_LABEL:
        return None
    # As a view of that field reads it: its first caption.
    return CaptionSource(field, 0) if field else DRAWN


class Drawn(NamedTuple):
    """The caption of a slot: entry `at` of the `entries` of a field; fell_back: another was drawn first."""

    field: CaptionField
    entries: list[Any]
    at: int
    fell_back: bool


@dataclass(frozen=True)
class CaptionRules:
    """The caption fields of a source, and what becomes of a sample that lacks the one drawn for it."""

    fields: tuple[CaptionField, ...] = (CaptionField(),)
    missing: Literal["fallback", "reject"] = "fallback"

    @property
    def counted(self) -> tuple[str, ...]:
        """The names under which captions are counted: by field, and by field those that took the place of
        another; none where there is no choice.
        """
        if len(self.fields) == 1:
            return ()
        kinds = (COUNTED, FELL_BACK) if self.missing == "fallback" else (COUNTED,)
        return tuple(f"{kind}/{entry.field}" for kind in kinds for entry in self.fields)

    def order(self, key: int) -> Iterator[CaptionField]:
        """Yields the fields, each drawn by weight among those that are left.

        The first one that a sample has is thereby drawn by weight among those it has.
        """
        left = list(self.fields)
        while len(left) > 1:
            # Sums and comparisons of IEEE doubles: no logarithm whose last bit a library may change.
            point = _uniform(key, "field", len(left)) * sum(entry.weight for entry in left)
            at = 0
            while at < len(left) - 1 and point >= left[at].weight:
                point -= left[at].weight
                at += 1
            yield left.pop(at)
        yield left[0]

    def draw(self, sample: RawSample, key: int) -> Drawn:
        """Returns the caption of a slot with this key. Raises Unusable; Absent where no field may serve.

        A field that holds something damaged makes the sample unusable, whatever the others hold.
        """
        lacking: list[Absent] = []
        for entry in self.order(key):
            try:
                entries = _usable(sample, entry)
            except Absent as absent:
                if self.missing == "reject" or len(self.fields) == 1:
                    raise
                lacking.append(absent)
                continue
            at = int(_uniform(key, "entry", len(entries)) * len(entries)) if len(entries) > 1 else 0
            return Drawn(entry, entries, at, bool(lacking))
        names = ", ".join(entry.field for entry in self.fields)
        raise Absent("missing caption", f"none of {names}: {lacking[0].reason}, {lacking[0].detail}"[:200])


def _usable(sample: RawSample, entry: CaptionField) -> list[Any]:
    """The entries that hold something, at least one; the first one's problem where none does."""
    found = caption_entries(sample, entry.field, entry.lines)
    if not found:
        raise Absent("missing caption", f"{entry.field} holds no caption")
    kept = [text for text in found if not _blank(text)]
    if not kept:
        # Raises, in the words for a blank one.
        checked_caption(found[0], entry.field)
    return kept


def field_captions(sample: RawSample, entry: CaptionField) -> list[str]:
    """Returns every caption that may be drawn at a field, in order; blank ones are passed over.

    Raises Unusable for one that is damaged, and Absent where there is none.
    """
    return [checked_caption(text, entry.field) for text in _usable(sample, entry)]


def _blank(text: Any) -> bool:
    return text is None or (isinstance(text, str) and not text.removeprefix("\ufeff").strip())


def slot_key(seed: int, epoch: int, slot: int) -> int:
    """Returns the key from which the random choices of a slot follow."""
    return hash_key(seed, epoch, "caption", slot)


def _uniform(key: int, *parts: str | int) -> float:
    """53 random bits in [0, 1)."""
    return (hash_key(key, *parts) >> 11) * 2.0**-53


class SlotCaptions:
    """The captions of one sample in one slot, whose random choices follow from `key`."""

    def __init__(self, rules: CaptionRules, sample: RawSample, key: int) -> None:
        self.rules = rules
        self.sample = sample
        self.key = key

    @cached_property
    def drawn(self) -> Drawn:
        """The caption drawn for the slot; raises as `CaptionRules.draw`."""
        return self.rules.draw(self.sample, self.key)

    @property
    def counted(self) -> tuple[str, ...]:
        """The names among `CaptionRules.counted` that the drawn caption counts for."""
        if len(self.rules.fields) == 1:
            return ()
        name = self.drawn.field.field
        return (
            (f"{COUNTED}/{name}", f"{FELL_BACK}/{name}") if self.drawn.fell_back else (f"{COUNTED}/{name}",)
        )

    def caption(self, source: CaptionSource) -> str:
        """Returns the caption at `source`. Raises Unusable, and Absent for a missing or empty one."""
        if source.field is not None:
            return caption(self.sample, source.field, source.entry)
        drawn, later = self.drawn, source.entry or 0
        name = drawn.field.field
        if later and "." not in name and not drawn.field.lines:
            # The drawn caption is the whole text; a later one is a line of it.
            return caption(self.sample, name, later)
        if later >= len(drawn.entries):
            raise Absent(
                "missing caption", f"{name} holds {len(drawn.entries)} caption(s), no number {later}"
            )
        return checked_caption(drawn.entries[(drawn.at + later) % len(drawn.entries)], name)
