"""Counts of hashes: exact below the limit, a fair share of them beyond it, in any order of groups."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from clipkit.data.hash_counts import HashCounts, hashes_of, of_text, to_text


def groups(seed: int, distinct: int, total: int, parts: int) -> list[list[bytes]]:
    draws = np.random.default_rng(seed).integers(distinct, size=total)
    return [[str(number).encode() for number in part] for part in np.array_split(draws, parts)]


def test_below_the_limit_counts_are_exact() -> None:
    parts = groups(1, 300, 1000, 7)
    counts = HashCounts(groups=True)
    for number, part in enumerate(parts):
        counts.add(of_text(to_text(hashes_of(part))), number)
    every = Counter(content for part in parts for content in part)
    assert counts.repeated() == (1000 - len(every), 1000)
    texts = [*every, b"never"]
    assert counts.times(hashes_of(texts)).tolist() == [every[text] for text in texts]
    places = {text: sorted({n for n, part in enumerate(parts) if text in part}) for text in every}
    shared = {int(hashes_of([text])[0]): where for text, where in places.items() if len(where) > 1}
    assert dict(counts.in_several_groups()) == shared


@pytest.mark.parametrize("limit", [100, 1000])
def test_beyond_the_limit_the_share_of_duplicates_stays_right(limit: int) -> None:
    parts = groups(2, 20_000, 30_000, 11)
    found = []
    for order in (parts, parts[::-1]):
        counts = HashCounts(limit)
        for part in order:
            counts.add(hashes_of(part))
        again, seen = counts.repeated()
        assert seen <= limit
        assert counts.seen == 30_000
        found.append((again, seen, counts.level))
    assert found[0] == found[1], "the order does not matter"
    again, seen, level = found[0]
    assert seen > limit / 4, "no more is left out than need be"
    assert seen * 2**level == pytest.approx(30_000, rel=5 / seen**0.5)
    exact = 1 - len({content for part in parts for content in part}) / 30_000
    assert again / seen == pytest.approx(exact, abs=2.5 / seen**0.5)
