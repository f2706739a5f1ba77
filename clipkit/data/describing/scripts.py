"""The script that a caption is written in: what can be told about its language without a model."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache

NO_LETTERS = "no letters"
_NAMED = {"HIRAGANA": "Kana", "KATAKANA": "Kana", "CJK": "Han", "KANGXI": "Han", "IDEOGRAPHIC": "Han"}
# What Unicode names begin with that is no script.
_FORMS = {"FULLWIDTH", "HALFWIDTH", "MODIFIER", "MATHEMATICAL", "CIRCLED", "SQUARED", "PARENTHESIZED"}


def script_of(text: str) -> str:
    """Returns the script of most letters ("Latin", "Cyrillic", "Han", ...); "no letters" for none.

    Han stands for Chinese, and for Japanese or Korean written in it; any Kana makes it Kana.
    """
    if text.isascii():
        return "Latin" if any(map(str.isalpha, text)) else NO_LETTERS
    found = Counter(filter(None, map(_script, text)))
    if not found:
        return NO_LETTERS
    if found["Kana"] and found["Han"]:
        found["Kana"] += found.pop("Han")
    return max(sorted(found), key=lambda script: found[script])


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str:
    if not character.isalpha():
        return ""
    words = unicodedata.name(character, "").split()
    while words and words[0] in _FORMS:
        words.pop(0)
    if not words:
        return ""
    first = words[0].split("-")[0]
    return _NAMED.get(first, first.capitalize())
