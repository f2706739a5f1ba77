"""Small edits of a caption that keep its meaning: EDA, Wei and Zou, arXiv:1901.11196.

Works on any script: where words are not separated by spaces (Chinese, Japanese, Thai ...) the characters
are moved and deleted instead. Synonyms exist for English (see synonyms).
"""

from __future__ import annotations

import random
import string
import unicodedata
from itertools import pairwise
from typing import NamedTuple

from clipkit.data.synonyms import SYNONYMS

ALPHA = 0.1
_PUNCTUATION = string.punctuation + "\u00a1\u00ab\u00bb\u00bf\u2013\u2014\u2018\u2019\u201c\u201d\u2026"
# Words with these endings form their plural in other ways: bodies, boxes, dishes.
_IRREGULAR = ("s", "x", "ch", "sh", "y", "z", "ing", "ed")
# Thai and Lao, Tibetan, Myanmar, Khmer, kana, CJK ideographs.
_UNSPACED = (
    (0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x9FFF),
    (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip
_ZERO_WIDTH_JOINER = "\u200d"


class _Unit(NamedTuple):
    """A word, or a character of a script without spaces; `space` is what stands before it."""

    space: str
    text: str


def eda(text: str, draw: random.Random, alpha: float = ALPHA) -> str:
    """Returns the text after one edit, drawn from those that are possible; never an empty text.

    The edits of the paper: n words replaced by synonyms, n synonyms inserted anywhere, n pairs of words
    swapped (n = alpha * words, at least 1), or every word deleted with probability alpha. A single word
    without synonyms comes back as it is. White space is collapsed. Only `draw.random()` is used, whose
    values no Python version changes.
    """
    units = _units(text)
    known = [at for at, unit in enumerate(units) if _synonyms(unit.text)]
    edits = [_replaced, _inserted] if known else []
    edits += [_swapped, _deleted] if len(units) > 1 else []
    if edits:
        edit = edits[_below(len(edits), draw)]
        units = edit(units, known, draw, alpha)
    return "".join(unit.space + unit.text for unit in units).strip() or text


def _below(count: int, draw: random.Random) -> int:
    return int(draw.random() * count)


def _times(units: list[_Unit], alpha: float) -> int:
    return max(1, int(alpha * len(units)))


def _replaced(units: list[_Unit], known: list[int], draw: random.Random, alpha: float) -> list[_Unit]:
    units, known = units.copy(), known.copy()
    for _ in range(min(_times(units, alpha), len(known))):
        at = known.pop(_below(len(known), draw))
        found = _synonyms(units[at].text)
        units[at] = _Unit(units[at].space, found[_below(len(found), draw)])
    return units


def _inserted(units: list[_Unit], known: list[int], draw: random.Random, alpha: float) -> list[_Unit]:
    out = units.copy()
    for _ in range(_times(units, alpha)):
        found = _synonyms(units[known[_below(len(known), draw)]].text.strip(_PUNCTUATION))
        word = found[_below(len(found), draw)].lower()
        at = _below(len(out) + 1, draw)
        if at < len(out):
            out[at] = _Unit(" ", out[at].text)
        out.insert(at, _Unit(" ", word))
    return out


def _swapped(units: list[_Unit], known: list[int], draw: random.Random, alpha: float) -> list[_Unit]:
    units = units.copy()
    for _ in range(_times(units, alpha)):
        first = _below(len(units), draw)
        second = (first + 1 + _below(len(units) - 1, draw)) % len(units)
        a, b = units[first], units[second]
        units[first], units[second] = _Unit(a.space, b.text), _Unit(b.space, a.text)
    return units


def _deleted(units: list[_Unit], known: list[int], draw: random.Random, alpha: float) -> list[_Unit]:
    spare = _below(len(units), draw)
    kept = [draw.random() >= alpha for _ in units]
    return [unit for at, unit in enumerate(units) if kept[at]] or [units[spare]]


def _units(text: str) -> list[_Unit]:
    units: list[_Unit] = []
    for word in text.split():
        if word.isascii():
            units.append(_Unit(" ", word))
            continue
        starts, apart = [0], stands_alone(word[0])
        for at in range(1, len(word)):
            if _attaches(word[at], word[at - 1]):
                continue
            alone = stands_alone(word[at])
            if alone or apart:
                starts.append(at)
            apart = alone
        for start, end in pairwise([*starts, len(word)]):
            units.append(_Unit("" if start else " ", word[start:end]))
    return units


def stands_alone(char: str) -> bool:
    """Returns whether a character belongs to a script that writes no spaces between words."""
    return any(low <= ord(char) <= high for low, high in _UNSPACED)


def _attaches(char: str, before: str) -> bool:
    """Vowel signs, accents, variation selectors and joined emoji are no characters of their own."""
    return (
        unicodedata.category(char).startswith("M")
        or char == _ZERO_WIDTH_JOINER
        or before == _ZERO_WIDTH_JOINER
    )


def _synonyms(word: str) -> tuple[str, ...]:
    """Synonyms in the shape of the word: with its punctuation, capital and plural ending."""
    core = word.strip(_PUNCTUATION)
    plain, ending = core.lower(), ""
    found = SYNONYMS.get(plain, ())
    if not found and plain.endswith("s"):
        ending = "s"
        found = tuple(other for other in SYNONYMS.get(plain[:-1], ()) if not other.endswith(_IRREGULAR))
    if not found:
        return ()
    if core[0].isupper():
        found = tuple(other.upper() if core.isupper() else other.capitalize() for other in found)
    before, _, after = word.partition(core)
    return tuple(f"{before}{other}{ending}{after}" for other in found)
