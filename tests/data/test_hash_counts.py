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
    assert counts.in_several_groups(1000) == (len(shared), sorted(shared.items()))
    assert counts.in_several_groups(5) == (len(shared), sorted(shared.items())[:5])


@pytest.mark.parametrize("limit", [100, 1000])
def test_beyond_the_limit_the_share_of_duplicates_stays_right(limit: int) -> None:
    parts = groups(2, 20_000, 30_000, 11)
    found = []
    for order in (parts, parts[::-1]):
        counts = HashCounts(limit)
        for part in order:
            counts.add(hashes_of(part))
        again, seen = counts.repeated()
        assert seen - again <= limit
        assert counts.seen == 30_000
        found.append((again, seen, counts.level))
    assert found[0] == found[1], "the order does not matter"
    again, seen, level = found[0]
    assert seen > limit / 4, "no more is left out than need be"
    assert seen * 2**level == pytest.approx(30_000, rel=5 / seen**0.5)
    exact = 1 - len({content for part in parts for content in part}) / 30_000
    assert again / seen == pytest.approx(exact, abs=2.5 / seen**0.5)


def test_what_stays_beyond_the_limit_keeps_its_copies_and_groups() -> None:
    parts = groups(3, 2_000, 6_000, 9)
    counts = HashCounts(500, groups=True)
    for number, part in enumerate(parts):
        counts.add(hashes_of(part), number)
    assert counts.level > 0
    hashes = [hashes_of(part).tolist() for part in parts]
    every = Counter(each for part in hashes for each in part)
    stays = {each for each in every if each % 2**counts.level == 0}
    wanted = sorted(every)
    found = counts.times(np.array(wanted, dtype=np.uint64)).tolist()
    assert found == [every[each] if each in stays else 0 for each in wanted]
    places = {each: [n for n, part in enumerate(hashes) if each in part] for each in stays}
    shared = sorted((each, where) for each, where in places.items() if len(where) > 1)
    assert counts.in_several_groups(1000) == (len(shared), shared)


def test_a_thing_with_more_copies_than_fit_is_counted_whole() -> None:
    for common in (0, 1 << 63, 12_345):
        counts = HashCounts(100)
        for part in range(20):
            counts.add(np.array([common] * 50 + [2 * part + 1], dtype=np.uint64))
        assert (counts.level, counts.seen) == (0, 1020)
        assert counts.repeated() == (999, 1020)
        assert counts.times(np.array([common, 3, 4], dtype=np.uint64)).tolist() == [1000, 1, 0]


def test_nothing_counted_is_nothing() -> None:
    for counts in (HashCounts(), HashCounts(groups=True)):
        counts.add(hashes_of([]))
        assert counts.repeated() == (0, 0)
        assert counts.times(hashes_of([b"x"])).tolist() == [0]
    assert counts.in_several_groups(5) == (0, [])
    assert of_text(to_text(hashes_of([]))).tolist() == []
