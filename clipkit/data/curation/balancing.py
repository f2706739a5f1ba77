"""MetaCLIP's balancing: which entries of a list a caption names, and how often each may be named.

Xu et al., arXiv:2309.16671, section 3: a caption stays when one of its entries draws below t / count, so that
frequent entries are thinned out to about t captions and rare ones keep all.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipkit.data.key_table import text_hash
from clipkit.data.text_edits import stands_alone
from clipkit.types import ConfigError, DataError

WORDS, PUBLISHED = "words", "published"
_WRAPPED = re.compile("([,.;:?!`])")
_BLANKS = re.compile("[\t\n\r]")
_APART = "\0"  # joins the tokens of an entry: in no token of either rule


@dataclass(frozen=True)
class Entries:
    """A list of entries in a file, one per line, and the rule by which captions name them.

    rule "words"      the words of the entry stand in the caption one after the other; letters and digits
                      only, case folded, so that (Dog), hot-dog and dog's name `dog`. Chinese, Japanese,
                      Thai and other scripts without spaces: by character.
    rule "published"  " entry " occurs in the caption after blanks are put around it and around , . ; : ? ! `
    """

    path: Path
    rule: str
    digest: str

    @classmethod
    def open(cls, path: Path, rule: str = WORDS) -> Entries:
        """Returns the entries of a file as it is now. Raises ConfigError and DataError."""
        names = _read(path)
        digest = hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest()
        return cls(path.absolute(), rule, digest)

    def find(self, text: str) -> NDArray[np.int32]:
        """Returns the numbers of the entries that the caption names, each once, rising."""
        known, lengths = _known(self)
        tokens = _published_tokens(text)[1:-1] if self.rule == PUBLISHED else word_tokens(text)
        found: set[int] = set()
        for start, token in enumerate(tokens):
            for length in lengths.get(token, ()):
                if start + length > len(tokens):
                    break
                found.update(known.get(_APART.join(tokens[start : start + length]), ()))
        return np.array(sorted(found), dtype=np.int32)

    def names(self) -> list[str]:
        """Returns the entries in order; DataError for a file without any."""
        return _read(self.path)


def _read(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror or error}", "give --balance a text file with one entry per line"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error})", "save it as UTF-8, one entry per line") from error
    names = [line.removesuffix("\r") for line in lines]
    names = [name for name in names if name.strip()]
    if not names:
        raise DataError(f"{path}: no entries", "write one entry per line")
    return names


@functools.lru_cache(maxsize=1)
def _known(entries: Entries) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Entries by their joined tokens, and the lengths of entries by their first token."""
    known: dict[str, tuple[int, ...]] = {}
    lengths: dict[str, tuple[int, ...]] = {}
    for number, name in enumerate(_read(entries.path)):
        tokens = name.split(" ") if entries.rule == PUBLISHED else word_tokens(name)
        if not tokens:
            continue
        joined = _APART.join(tokens)
        if joined not in known:
            known[joined] = (number,)
        elif entries.rule == PUBLISHED:
            known[joined] += (number,)
        # By words, entries that differ in case or punctuation are one: the first speaks for them.
        if len(tokens) not in lengths.get(tokens[0], ()):
            lengths[tokens[0]] = tuple(sorted((*lengths.get(tokens[0], ()), len(tokens))))
    return known, lengths


def _published_tokens(text: str) -> list[str]:
    return _BLANKS.sub(" ", _WRAPPED.sub(r" \1 ", f" {text} ")).split(" ")


def word_tokens(text: str) -> list[str]:
    """Returns the words of a text: runs of letters, digits and their accents, case folded."""
    tokens: list[str] = []
    inside = False
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    for char in unicodedata.normalize("NFC", text.casefold()):
        if stands_alone(char):
            tokens.append(char)
            inside = False
        elif char.isalnum() or (inside and unicodedata.category(char).startswith("M")):
            tokens[-1:] = [tokens[-1] + char] if inside else [*tokens[-1:], char]
            inside = True
        else:
            inside = False
    return tokens


_ASCII_WORD = re.compile("[a-z0-9]+")


def keep_probabilities(counts: NDArray[np.int64], t: float) -> NDArray[np.float64]:
    """Returns the probability of every entry, t / max(count, t): float64 like `counts`."""
    return t / np.maximum(counts, t)


def drawn(
    seed: int, keys: NDArray[np.uint64], entries: NDArray[np.uint64], p: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Returns whether each entry of a caption draws below its probability: a function of seed, key and entry.

    keys, entries: hashes; all of one length.
    """
    with np.errstate(over="ignore"):
        state = _mixed(keys + np.uint64(seed % 2**64)) ^ entries
        uniform = (_mixed(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform < p


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014): every bit in moves every bit out."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def kept_rows(
    seed: int,
    draws: NDArray[np.uint64],
    num_entries: NDArray[np.int32],
    flat: NDArray[np.int32],
    entry_hashes: NDArray[np.uint64],
    p: NDArray[np.float64],
    keep_unmatched: bool = False,
) -> NDArray[np.bool_]:
    """Returns which captions stay, bool (n,): those with an entry that draws below its probability.

    draws (n,) hashes of the keys; num_entries (n,) entries of each; flat: their numbers, one after the other.
    """
    rows = np.repeat(np.arange(len(draws)), num_entries)
    keep = np.zeros(len(draws), dtype=np.bool_)
    keep[rows[drawn(seed, np.asarray(draws)[rows], entry_hashes[flat], p[flat])]] = True
    return keep | (np.asarray(num_entries) == 0) if keep_unmatched else keep


def entry_hashes(names: Sequence[str]) -> NDArray[np.uint64]:
    """Returns the hashes of the entries, uint64."""
    return np.array([text_hash(name) for name in names], dtype=np.uint64)
