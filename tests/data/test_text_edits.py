"""EDA: four edits that keep the words' meaning, on any script, and never an empty text."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.data.synonyms import SYNONYMS
from clipkit.data.text_edits import eda

CAPTION = "A small dog, two kids and a red car near the river"
MEANINGFUL = {
    "red", "green", "blue", "yellow", "black", "white", "orange", "purple", "pink", "brown", "grey", "gray",
    "one", "two", "three", "four", "five", "left", "right", "above", "below", "over", "under", "behind",
    "front", "top", "bottom", "inside", "outside", "north", "south", "east", "west", "no", "not",
}  # fmt: skip


def edits(text: str, count: int = 300, alpha: float = 0.1) -> list[str]:
    return [eda(text, random.Random(seed), alpha) for seed in range(count)]


def test_synonyms_leave_out_what_captions_are_about() -> None:
    groups = {frozenset((word, *others)) for word, others in SYNONYMS.items()}
    assert len(groups) >= 150
    # Every word stands in one group, or its synonyms would not be symmetric.
    assert sum(map(len, groups)) == len(SYNONYMS)
    assert not MEANINGFUL & SYNONYMS.keys()
    for word, others in SYNONYMS.items():
        assert word.isalpha()
        assert word == word.lower()
        assert others


def test_every_edit_occurs_and_keeps_the_rest() -> None:
    before = Counter(CAPTION.split())
    kinds: Counter[str] = Counter()
    for after in map(Counter, map(str.split, edits(CAPTION))):
        gone, new = before - after, after - before
        if not gone and not new:
            kinds["moved"] += 1
        elif not new:
            kinds["deleted"] += 1
        elif not gone:
            kinds["inserted"] += 1
            assert all(word in SYNONYMS for word in new)
        else:
            kinds["replaced"] += 1
            assert (gone.total(), new.total()) == (1, 1)
    assert set(kinds) == {"moved", "deleted", "inserted", "replaced"}
    assert min(kinds.values()) > 30
    assert CAPTION not in set(edits(CAPTION, 20)) or len(set(edits(CAPTION, 20))) > 10


def test_edits_are_repeatable_and_grow_with_alpha() -> None:
    assert edits(CAPTION) == edits(CAPTION)
    lengths = {
        alpha: sum(len(text.split()) for text in edits("one " * 30, 200, alpha)) for alpha in (0.1, 0.5)
    }
    assert lengths[0.5] < lengths[0.1]


def test_words_keep_their_shape() -> None:
    found = set(edits("Dogs,", 200))
    assert found == {"Hounds,"} | {"Dogs, hounds", "hounds Dogs,"}
    assert "(HOUND)" in edits("(DOG)", 50)
    assert set(edits("boxes", 20)) == {"boxes"}
    # Irregular plurals are not guessed.
    assert not any("bodys" in text or "boxs" in text for text in edits("cars boats bodies", 100))


@pytest.mark.parametrize(
    "text",
    [
        "一只红色的猫坐在沙发上",
        "赤い車が道を走っている",
        "แมวสีแดงนั่งอยู่บนโซฟา",
        "собака бежит по снегу",
        "كلب أحمر يجري",
        "एक लाल कार",
        "빨간 자동차가 달린다",
        "👩‍👩‍👧 🏳️‍🌈 ✂️",
        "我有一个 iPhone 手机",
    ],
)
def test_any_script_is_edited(text: str) -> None:
    found = edits(text, 60)
    assert len(set(found)) > 5
    whole = Counter("".join(text.split()))
    for edited in found:
        assert edited.strip()
        assert not Counter("".join(edited.split())) - whole
        # Marks stay behind the letter they belong to.
        assert not edited[0].encode("utf-8").startswith(b"\xcc")


@pytest.mark.parametrize("text", ["x", "...", "猫", "\u0301", "red", "7"])
def test_a_single_unknown_word_is_left_alone(text: str) -> None:
    assert set(edits(text, 20)) == {text}


@given(st.text(min_size=1, max_size=60).filter(lambda text: bool(text.strip())), st.integers(0, 1 << 63))
@settings(max_examples=300, deadline=None)
def test_never_empty(text: str, seed: int) -> None:
    for alpha in (0.1, 0.9, 1.0):
        assert eda(text, random.Random(seed), alpha).strip()


def test_long_and_hostile_captions_are_quick() -> None:
    start = time.process_time()
    for text in ("a" + "!" * 65_000 + "b", "猫" * 65_000, "é" * 65_000, "a " * 32_000, "\u0301" * 65_000):
        assert eda(text, random.Random(0))
    assert time.process_time() - start < 10
