"""The order is arithmetic: conservation, equality for every world, and values that never change."""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.data.order import Order, default_chunks, default_lanes, divisors, hash_key, permutation, permuted
from clipkit.data.ranges import RowRanges
from clipkit.dist import World
from clipkit.types import ConfigError

GOLDEN = Path(__file__).with_name("golden_order.json")


def make_order(counts: list[int], batch_size: int, world_size: int = 1, seed: int = 1) -> Order:
    lanes = default_lanes(batch_size, world_size)
    chunk, window = default_chunks(sum(counts), lanes, lanes // world_size)
    return Order(np.array(counts, dtype=np.int64), batch_size, lanes, chunk, window, seed)


def epoch_ids(order: Order, epoch: int) -> Any:
    """(steps, B) ids, read lane by lane as the loader does."""
    table = order.epoch(epoch)
    lanes = []
    for lane in range(order.lanes):
        position, ids = 0, []
        while position < order.lane_length:
            window = table.window_at(lane, position)
            assert window.start == position
            ids.append(window.ids)
            position += len(window.ids)
        lanes.append(np.concatenate(ids))
    rows = np.stack(lanes).reshape(order.lanes, order.steps_per_epoch, order.quota)
    return rows.transpose(1, 0, 2).reshape(order.steps_per_epoch, order.batch_size)


def split_counts(total: int, parts: int, rng: random.Random) -> list[int]:
    cuts = sorted(rng.randint(0, total) for _ in range(parts - 1))
    return [b - a for a, b in pairwise([0, *cuts, total])]


def slow_epoch(order: Order, epoch: int) -> list[list[int]]:
    """An independent, obvious reading of the definition: Python integers and lists of samples."""

    def splitmix(key: int, counter: int) -> int:
        z = (counter * 0x9E3779B97F4A7C15 + key) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    def shuffled(items: list[Any], key: int) -> list[Any]:
        order_of = sorted(range(len(items)), key=lambda at: splitmix(key, at + 1))
        return [items[at] for at in order_of]

    total, length = order.num_samples, order.num_samples % order.batch_size
    begin = hash_key(order.seed, "left out") + epoch * length
    left_out = {(begin + at) % total for at in range(length)}
    chunks, first = [], 0
    for count in order.counts.tolist():
        for a in range(0, count, order.chunk_size):
            ids = range(first + a, first + min(a + order.chunk_size, count))
            chunks.append([sample for sample in ids if sample not in left_out])
        first += count
    chunks = shuffled(chunks, hash_key(order.seed, epoch, "chunks"))
    line = [(number, sample) for number, chunk in enumerate(chunks) for sample in chunk]
    batches: list[list[int]] = [[] for _ in range(order.steps_per_epoch)]
    for lane in range(order.lanes):
        part = line[lane * order.lane_length : (lane + 1) * order.lane_length]
        low, high = part[0][0], part[-1][0]
        shift = lane % order.window_chunks if high - low >= 4 * order.window_chunks else 0
        windows: dict[int, list[int]] = {}
        for number, sample in part:
            windows.setdefault((number - low + shift) // order.window_chunks, []).append(sample)
        ids = []
        for window, samples in sorted(windows.items()):
            ids += shuffled(samples, hash_key(order.seed, epoch, "window", lane, window))
        for step in range(order.steps_per_epoch):
            batches[step] += ids[step * order.quota : (step + 1) * order.quota]
    return batches


def test_every_batch_size_keeps_every_sample() -> None:
    """B = 1..512: each sample once per epoch but the N mod B left out, which differ from epoch to epoch."""
    rng = random.Random(0)
    for batch_size in range(1, 513):
        total = batch_size + rng.choice([0, 1, rng.randint(0, batch_size), rng.randint(0, 700)])
        order = make_order(split_counts(total, rng.randint(1, 6), rng), batch_size, seed=batch_size)
        epoch = rng.randint(0, 9)
        used = epoch_ids(order, epoch)
        assert used.shape == (total // batch_size, batch_size)
        out = {sample for begin, end in order.left_out(epoch) for sample in range(begin, end)}
        after = {sample for begin, end in order.left_out(epoch + 1) for sample in range(begin, end)}
        assert len(out) == total % batch_size
        assert not out or out != after
        assert np.array_equal(np.sort(used.ravel()), [sample for sample in range(total) if sample not in out])


def test_every_world_and_worker_count_shares_the_same_rows() -> None:
    """B = 1..512, every W dividing B, workers 0..3: one order for all W, rows cut without gap or overlap."""
    for batch_size in range(1, 513):
        lanes = default_lanes(batch_size, 1)
        for size in divisors(batch_size):
            assert default_lanes(batch_size, size) == lanes
            ends = [RowRanges(batch_size, lanes, World(r, size), 0).of_rank() for r in range(size)]
            assert ends[0][0] == 0
            assert ends[-1][1] == batch_size
            assert all(a[1] == b[0] for a, b in pairwise(ends))
            for workers in range(4):
                for rank in {0, size // 2, size - 1}:
                    cuts = RowRanges(batch_size, lanes, World(rank, size), workers).of_workers()
                    assert len(cuts) <= max(1, workers)
                    assert (cuts[0][0], cuts[-1][1]) == ends[rank]
                    assert all(a < b for a, b in cuts)
                    assert all(a[1] == b[0] for a, b in pairwise(cuts))


@pytest.mark.parametrize(("batch_size", "lanes", "size"), [(32768, 1024, 56), (1024, 1024, 56), (8, 8, 3)])
def test_uneven_ranks_own_every_lane_once(batch_size: int, lanes: int, size: int) -> None:
    """Lanes in order, floor or ceil of L / W to a rank; rows that add up to the batch; W = 1's order."""
    quota = batch_size // lanes
    ranges = [RowRanges(batch_size, lanes, World(rank, size), 4, uneven=True) for rank in range(size)]
    owned = [each.of_rank() for each in ranges]
    assert all(first % quota == end % quota == 0 for first, end in owned)
    lanes_of = [(first // quota, end // quota) for first, end in owned]
    assert [lane for first, end in lanes_of for lane in range(first, end)] == list(range(lanes))
    assert {end - first for first, end in lanes_of} == {lanes // size, lanes // size + 1}
    assert {each.shares for each in ranges} == {tuple(end - first for first, end in owned)}
    assert sum(ranges[0].shares) == batch_size
    order = Order(np.full(7, batch_size), batch_size, lanes, *default_chunks(7 * batch_size, lanes, 19), 3)
    whole = order.epoch(0).batch(2)
    parts = []
    for first, end in lanes_of:
        held = order.epoch(0, (first, end))
        for lane in range(first, end):
            position = 2 * quota
            while position < 3 * quota:
                window = held.window_at(lane, position)
                stop = min(3 * quota, window.start + len(window.ids))
                parts.append(window.ids[position - window.start : stop - window.start])
                position = stop
    assert np.array_equal(np.concatenate(parts), whole)


def test_lanes_of_uneven_worlds() -> None:
    """Every W <= B has lanes for all its ranks; where W divides B they are those of even ranks."""
    for batch_size in (1, 7, 512, 1009, 1536):
        for size in {1, 2, 3, 5, 56, batch_size}:
            if size > batch_size:
                with pytest.raises(ConfigError, match=f"multiple of the {size} processes"):
                    default_lanes(batch_size, size, uneven=True)
                continue
            lanes = default_lanes(batch_size, size, uneven=True)
            assert batch_size % lanes == 0
            assert lanes >= size
            if batch_size % size == 0:
                assert lanes == default_lanes(batch_size, size)
            else:
                with pytest.raises(ConfigError, match=f"data.uneven=true takes any up to {batch_size}"):
                    default_lanes(batch_size, size)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_the_slow_definition(data: st.DataObject) -> None:
    lanes = data.draw(st.integers(1, 6))
    batch_size = lanes * data.draw(st.integers(1, 5))
    counts = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=5))
    counts.append(max(0, batch_size - sum(counts)))
    order = Order(
        np.array(counts, dtype=np.int64),
        batch_size,
        lanes,
        chunk_size=data.draw(st.integers(1, 9) | st.integers(10, 300)),
        window_chunks=data.draw(st.integers(1, 3)),
        seed=data.draw(st.integers(0, 2**63)),
    )
    epoch = data.draw(st.integers(0, 1000))
    expected = slow_epoch(order, epoch)
    assert epoch_ids(order, epoch).tolist() == expected
    step = data.draw(st.integers(0, order.steps_per_epoch - 1))
    assert order.epoch(epoch).batch(step).tolist() == expected[step]
    first = data.draw(st.integers(0, lanes - 1))
    end = data.draw(st.integers(first + 1, lanes))
    part = order.epoch(epoch, (first, end))
    position = data.draw(st.integers(0, order.lane_length - 1))
    for lane in range(first, end):
        window = part.window_at(lane, position)
        assert np.array_equal(window.ids, order.epoch(epoch).window_at(lane, position).ids)
        assert window.start <= position < window.start + len(window.ids)


def test_left_out_samples_are_fair() -> None:
    """Over N epochs every sample is left out equally often."""
    order = Order(np.array([23]), 9, 3, chunk_size=64, window_chunks=1, seed=1)
    missed = np.zeros(23, dtype=int)
    for epoch in range(23):
        assert epoch_ids(order, epoch).tolist() == slow_epoch(order, epoch)
        for begin, end in order.left_out(epoch):
            missed[begin:end] += 1
    assert set(missed) == {23 % 9}


def test_order_depends_on_seed_and_epoch() -> None:
    order = make_order([400], 16)
    other = make_order([400], 16, seed=2)
    assert not np.array_equal(epoch_ids(order, 0), epoch_ids(order, 1))
    assert not np.array_equal(epoch_ids(order, 0), epoch_ids(other, 0))
    assert np.array_equal(epoch_ids(order, 3), epoch_ids(make_order([400], 16), 3))


def test_neighbours_in_a_shard_are_spread() -> None:
    """Neighbours of a sorted set lie nearly as far apart in the epoch as in a random order (N / 3)."""
    order = make_order([3000, 3000], 32)
    place = np.argsort(epoch_ids(order, 0).ravel())
    distance = np.abs(np.diff(place)).mean() / len(place)
    assert distance > 0.2


def test_permutation_is_one() -> None:
    for count in (0, 1, 2, 1000):
        assert sorted(permutation(count, 7).tolist()) == list(range(count))
    first = np.bincount([int(permutation(5, key)[0]) for key in range(2000)], minlength=5)
    assert first.min() > 320


def test_golden_values() -> None:
    """These numbers are what running jobs continue by; a change needs a new ORDER_VERSION."""
    golden = json.loads(GOLDEN.read_text())
    assert hash_key(3, "chunks", 1) == golden["hash"]
    assert permutation(12, 99).tolist() == golden["permutation"]
    order = Order(np.array([30, 5, 40]), 8, 4, 3, 2, 11)
    assert [order.epoch(epoch).batch(2).tolist() for epoch in (0, 1)] == golden["batches"]
    large = Order(np.array([10_000] * 40), 4096, 512, 64, 8, 3)
    batch = large.epoch(5).batch(50)
    assert [int(batch.sum()), int(batch[0]), int(batch[-1])] == golden["large"]


def test_defaults_for_small_sets_and_memory() -> None:
    assert default_lanes(8, 1) == 8
    assert default_lanes(32768, 64) == 1024
    assert default_lanes(1024, 1) == 512
    assert default_lanes(521, 1) == 1  # a prime above 512 leaves one lane
    assert default_chunks(8, 8, 8) == (1, 2)
    assert default_chunks(120, 8, 8) == (4, 5)
    assert default_chunks(10**6, 16, 16) == (64, 8)
    for lanes in (8, 512):
        chunk, window = default_chunks(10**6, lanes, lanes, window_samples=20_000)
        assert chunk * window * lanes <= 20_000
    assert default_lanes(512, 1, window_samples=1000) * 16 <= 1000
    assert default_chunks(10**7, 8, 8, window_samples=1000, stride=16) == (64, 1)


def test_refusals_name_key_and_value() -> None:
    with pytest.raises(ConfigError, match="batch_size=10 is not a multiple of the 4 processes"):
        default_lanes(10, 4)
    with pytest.raises(ConfigError, match="larger than the set of 7 samples"):
        make_order([7], 8)
    with pytest.raises(ConfigError, match="lanes=3 does not divide"):
        Order(np.array([100]), 8, 3, 4, 4, 0)
    with pytest.raises(ConfigError, match="1, 2, 4, 8"):
        RowRanges(24, 8, World(0, 3), 0)


def test_memory_of_an_epoch_is_below_30_bytes_per_chunk() -> None:
    """500 million samples are 7.85 million chunks: 300 MB for a process must hold them and its index."""
    order = Order(np.full(2000, 10_000), 4096, 512, 64, 8, 0)
    tracemalloc.start()
    try:
        epoch = order.epoch(1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30 * order.num_chunks
    assert len(epoch.window_at(0, 0).ids) == 512


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_permuted_positions_are_a_permutation(count: int) -> None:
    whole = permuted(count, 7, np.arange(count))
    assert sorted(whole.tolist()) == list(range(count))
    assert permuted(count, 7, np.arange(count)[::-2]).tolist() == whole[::-2].tolist()


def test_permuted_positions_are_spread_evenly() -> None:
    # Every order of four about equally often: 24 orders, 2400 keys, chi-squared with 23 degrees of freedom.
    times = Counter(tuple(permuted(4, key, np.arange(4)).tolist()) for key in range(2400))
    assert sum((times[order] - 100) ** 2 / 100 for order in itertools.permutations(range(4))) < 60
    large = permuted(10**12, 3, np.arange(20_000))
    assert len(set(large.tolist())) == 20_000
    assert abs(large.mean() / 10**12 - 0.5) < 5 * 0.2887 / 20_000**0.5
