"""`data.index: lazy`: the first epoch's order from whole shards, before anything is known about them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clipkit.data.remote
from clipkit.config import make_config
from clipkit.data.first_epoch import LaneReader, first_lanes
from clipkit.data.indexing import build_index
from clipkit.data.lazy import LazyStream
from clipkit.data.loader import RejectBudget
from clipkit.data.order import Order, hash_key, permutation
from clipkit.data.source import expand_shards
from clipkit.dist import World
from clipkit.types import Batch, ConfigError, DataError
from tests.data.makers import good, png, same, stream, take, write_shards, write_tar
from tests.data.servers import serving, status
from tests.data.test_loader import global_batches

COUNTS = [7, 9, 8, 6, 10, 7, 8, 9, 6, 5, 9, 8, 7, 11, 4, 8]
"""16 shards of 122 samples: four lanes of four."""
SIZES = {"lanes": 4, "batch_size": 12}
FIRST, LATER = 8, 10
"""Steps of the epochs: the shortest lane of the first one holds 26 samples (see the oracle)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("lazy") / "set", COUNTS)


def lazy(shards: Path | str, world: World | None = None, saved: Any = None, **options: Any) -> LazyStream:
    # Windows of about six samples.
    settings: dict[str, Any] = {"index": "lazy", "lanes": 4, "window_bytes": 150_000, **options}
    opened = stream(shards, SIZES["batch_size"], world, saved, **settings)
    assert isinstance(opened, LazyStream)
    return opened


def oracle(counts: list[int], window: int, seed: int = 5) -> list[list[int]]:
    """The keys of all batches of the first epoch, from lists of everything."""
    starts = np.cumsum([0, *counts])
    lanes: list[list[int]] = [[] for _ in range(SIZES["lanes"])]
    for at, shard in enumerate(permutation(len(counts), hash_key(seed, 0, "shards"))):
        lanes[at % len(lanes)] += range(starts[shard], starts[shard + 1])
    for number, lane in enumerate(lanes):
        # Its first window is shorter, by lane / 8 of a window.
        cuts = [0, *range(window - number % 8 * window // 8, len(lane), window), len(lane)]
        pieces = [lane[a:b] for a, b in pairwise(cuts)]
        shuffled = [
            piece[at]
            for turn, piece in enumerate(pieces)
            for at in permutation(len(piece), hash_key(seed, 0, "lane window", number, turn))
        ]
        lanes[number] = shuffled
    quota = SIZES["batch_size"] // len(lanes)
    steps = min(len(lane) for lane in lanes) // quota
    return [
        [key for lane in lanes for key in lane[step * quota : (step + 1) * quota]] for step in range(steps)
    ]


def keys(batches: list[Batch]) -> list[list[int]]:
    return [[int(key) for key in batch.keys] for batch in batches]


def test_the_first_epoch_is_what_whole_lists_give(folder: Path) -> None:
    opened = lazy(folder)
    position = opened.state(0)
    window = position["first_window"]
    assert (position["exact"], position["index"], position["first_lanes"]) == (True, "lazy", 4)
    assert opened.num_samples is opened.steps_per_epoch is None
    assert "16 shards, indexed while the first epoch is read; exact order, shard-level" in opened.summary()
    expected = oracle(COUNTS, window)
    assert 1 < window < len(expected) * 3
    batches = take(opened, 0, FIRST + 2 * LATER)
    assert len(expected) == FIRST
    assert keys(batches[:FIRST]) == expected
    # Then the ordinary order, epoch 1 first, and ids that never change.
    index = build_index(expand_shards(str(folder)))
    sizes = (position["lanes"], position["chunk_size"], position["window_chunks"])
    order = Order(index.counts, 12, *sizes, 5)
    later = [order.epoch(epoch).batch(step).tolist() for epoch in (1, 2) for step in range(LATER)]
    assert keys(batches[FIRST:]) == later
    places = {(int(key), int(i)) for batch in batches for key, i in zip(batch.keys, batch.ids, strict=True)}
    assert len({key for key, _ in places}) == len({i for _, i in places}) == len(places)
    assert (opened.num_samples, opened.steps_per_epoch) == (122, LATER)
    for step, batch in enumerate(batches):
        within = step if step < FIRST else (step - FIRST) % LATER
        assert batch.slots.tolist() == list(range(within * 12, within * 12 + 12))
    ends = [step for step in range(1, len(batches) + 1) if opened.ends_epoch(step)]
    assert ends == [FIRST, FIRST + LATER, FIRST + 2 * LATER]
    assert [opened.state(step)["epoch"] for step in (FIRST - 1, FIRST, FIRST + LATER)] == [0, 1, 2]


def test_rows_are_the_samples_of_the_ordinary_reader(folder: Path, tmp_path: Path) -> None:
    """Same pixels and captions, with the augmentation of the slot."""
    (tmp_path / "one").mkdir()
    shutil.copy(folder / "00000.tar", tmp_path / "one")
    whole = {batch.keys[0]: batch for batch in take(stream(tmp_path / "one", 1, lanes=1), 0, 7)}
    for batch in take(stream(tmp_path / "one", 1, lanes=1, index="lazy"), 0, 7):
        assert torch.equal(batch.texts["text"], whole[batch.keys[0]].texts["text"])
        assert batch.images["image"].shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("workers", "starts"), [(0, (1, 5, FIRST - 1, FIRST, FIRST + 1)), (2, (5,)), (3, ())]
)
def test_workers_and_starts_change_nothing(
    folder: Path, tmp_path: Path, workers: int, starts: tuple[int, ...]
) -> None:
    total = FIRST + 3
    reference = take(lazy(folder), 0, total)
    assert same(take(lazy(folder, workers=workers), 0, total), reference)
    # Saved positions, on to the border between the epochs and over it, in a folder that knows nothing.
    for start in starts:
        first = lazy(folder, workers=workers)
        take(first, 0, start)
        state = json.loads(json.dumps(first.state(start)))
        fresh = tmp_path / str(start)
        shutil.copytree(folder, fresh, ignore=shutil.ignore_patterns(".*"))
        again = lazy(fresh, saved=state, workers=workers)
        assert same(take(again, start, total), reference[start:])
        assert again.state(start)["epoch"] == int(start >= FIRST)


def test_real_ranks_end_the_first_epoch_together(folder: Path, run_ranks: Callable[..., list[Any]]) -> None:
    # Windows take what memory a rank may use: those of one process.
    began = lazy(folder).state(0)
    reference = take(lazy(folder), 0, FIRST + 4)
    parts = run_ranks(2, _rank_batches, str(folder), 0, began)
    assert same(global_batches([batches for batches, _ in parts]), reference)
    assert parts[0][1] == parts[1][1]
    # The position that two ranks saved continues on one and the other way round.
    state = parts[0][1]
    assert len(state["passed"]) >= 4
    assert same(take(lazy(folder, saved=state), 3, FIRST + 4), reference[3:])
    parts = run_ranks(2, _rank_batches, str(folder), 3, state)
    assert same(global_batches([batches for batches, _ in parts]), reference[3:])


def _rank_batches(rank: int, size: int, folder: str, start: int, saved: Any) -> Any:
    opened = lazy(folder, World(rank, size), saved, workers=start and 2)
    batches = take(opened, start, 3)
    state = json.loads(json.dumps(opened.state(3)))
    return batches + take(opened, max(3, start), FIRST + 4), state


def test_what_is_known_already_changes_nothing(folder: Path, tmp_path: Path) -> None:
    reference = take(lazy(folder), 0, FIRST)
    known = tmp_path / "known"
    shutil.copytree(folder, known)
    build_index(expand_shards(str(known)))
    assert same(take(lazy(known), 0, FIRST), reference)


def test_a_resume_reads_no_shard_before_the_one_in_progress(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lazy(folder)
    take(first, 0, 6)
    state = first.state(6)
    finished = {int(shard) for shard, how in state["passed"].items() if how[2]}
    assert len(finished) >= 4
    opened = lazy(folder, saved=state)
    reader: Any = opened._lane_reader
    assert isinstance(reader, LaneReader)
    read: set[int] = set()
    plain = reader.files.read

    def noting(shard: int, begin: int, end: int, facts: Any) -> bytes:
        read.add(shard)
        return plain(shard, begin, end, facts)

    monkeypatch.setattr(reader.files, "read", noting)
    take(opened, 6, 7)
    assert read
    assert not read & {int(n) for n in finished} - set(_in_window(opened, 6))


def _in_window(opened: LazyStream, step: int) -> list[int]:
    """Shards of the windows that hold the rows of a step."""
    order = opened._lane_reader.order
    found = []
    for lane in range(order.lanes):
        samples = [shard for shard in order.shards(lane) for _ in range(COUNTS[shard])]
        _, start, end = order.window_at(lane, step * order.quota)
        found += samples[start:end]
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_in_the_middle_is_an_error_with_member_and_byte(
    tmp_path: Path, folder: Path, workers: int
) -> None:
    spoiled = tmp_path / "spoiled"
    shutil.copytree(folder, spoiled, ignore=shutil.ignore_patterns(".*"))
    middle = lazy(folder)._lane_reader.order.shards(2)[1]
    shard = spoiled / f"{middle:05d}.tar"
    with open(shard, "r+b") as file:
        file.seek(2048 * 3)
        file.write(bytes(1024))
    with pytest.raises(
        DataError, match=rf"{middle:05d}\.tar: data after the end-of-archive .*byte \d+, after"
    ):
        take(lazy(spoiled, workers=workers), 0, FIRST)


def test_damage_reaches_every_rank(tmp_path: Path, folder: Path, run_ranks: Callable[..., list[Any]]) -> None:
    spoiled = tmp_path / "spoiled"
    shutil.copytree(folder, spoiled, ignore=shutil.ignore_patterns(".*"))
    middle = lazy(folder)._lane_reader.order.shards(3)[1]
    shard = spoiled / f"{middle:05d}.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    found = run_ranks(2, _rank_damage, str(spoiled))
    assert found[0] == found[1]
    assert f"{middle:05d}.tar" in found[0]
    assert "at byte" in found[0]


def _rank_damage(rank: int, size: int, folder: str) -> str:
    opened = lazy(folder, World(rank, size))
    with pytest.raises(DataError) as caught:
        take(opened, 0, FIRST)
    return caught.value.cause


def test_shards_that_changed_are_refused(tmp_path: Path, folder: Path) -> None:
    first = lazy(folder)
    take(first, 0, 6)
    state = first.state(6)
    whole = [int(shard) for shard, how in state["passed"].items() if how[2] and int(shard)]
    begun = [int(shard) for shard, how in state["passed"].items() if not how[2]]
    before = [n for n in whole if n not in _in_window(first, 6)]
    assert before
    assert begun
    for number, steps in ((before[0], FIRST + 1), (begun[0], FIRST)):
        other = tmp_path / str(number)
        shutil.copytree(folder, other, ignore=shutil.ignore_patterns(".*"))
        samples = [good(900 + n) for n in range(COUNTS[number])]
        write_tar(other / f"{number:05d}.tar", samples)
        with pytest.raises(DataError, match=rf"{number:05d}\.tar: .*the shard changed"):
            take(lazy(other, saved=state), 6, steps)
    (tmp_path / "more").mkdir()
    more = tmp_path / "more" / "set"
    shutil.copytree(folder, more, ignore=shutil.ignore_patterns(".*"))
    write_tar(more / "00016.tar", [good(900)])
    with pytest.raises(ConfigError, match="shards_sha"):
        lazy(more, saved=state)


def test_bad_samples_are_replaced_in_their_slots(folder: Path, tmp_path: Path) -> None:
    """One among good ones, and a whole shard of them: the samples that follow in the lane stand in."""
    first = sum(COUNTS[:5])
    bad = {5, *range(first, first + COUNTS[5])}
    spoiled = write_shards(tmp_path / "bad", COUNTS, {n: [(f"{n:06d}.png", png(n)[:40])] for n in bad})
    opened = lazy(spoiled)
    # Windows of four: the shard of seven bad ones fills at least one of them.
    opened = lazy(spoiled, saved={**opened.state(0), "first_window": 4})
    clean = take(lazy(folder, saved={**opened.state(0)}), 0, FIRST)
    dirty = take(opened, 0, FIRST)
    served = {int(key) for batch in clean for key in batch.keys}
    assert {int(reject.key) for batch in dirty for reject in batch.rejects} == bad & served
    assert len(bad & served) > 4
    for before, after in zip(clean, dirty, strict=True):
        for row, key in enumerate(before.keys):
            if int(key) in bad:
                (reject,) = [entry for entry in after.rejects if entry.slot == int(after.slots[row])]
                assert after.keys[row] == reject.substitute
                assert int(after.keys[row]) not in bad
            else:
                assert torch.equal(after.images["image"][row], before.images["image"][row])
    assert same(take(lazy(spoiled, saved=opened.state(0), workers=2), 0, FIRST), dirty)
    with pytest.raises(DataError, match="3 unusable samples in a row"):
        take(lazy(spoiled, saved=opened.state(0), max_consecutive=3), 0, FIRST)
    budget = RejectBudget(0.01, 100)
    budget.add([reject for batch in dirty for reject in batch.rejects], 12 * FIRST)
    with pytest.raises(DataError, match="are unusable"):
        budget.end_of_epoch()


def test_a_server_is_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(clipkit.data.remote, "RETRIES", (0.0, 0.0))
    reference = take(lazy(folder), 0, FIRST + 2)
    with serving(folder) as server:
        opened = lazy(f"{server.url}/{{00000..00015}}.tar")
        batches = opened.batches(0, FIRST + 2)
        found = [next(batches)]
        server.faults.extend([status(503)] * 2)
        found += list(batches)
        asked = [path for path, wanted, _ in server.requests if wanted]
    assert same(found, reference)
    assert sum(batch.retries for batch in found) == 2
    assert len(asked) < 16 * 8


@pytest.mark.parametrize(
    ("num_shards", "lanes", "world", "expected"),
    [
        (5, 12, 1, 1),
        (5, 12, 2, 4),
        (16, 4, 1, 4),
        (1000, 512, 1, 128),
        (50_000, 512, 8, 512),
        (3, 12, 4, None),
    ],
)
def test_lanes_of_whole_shards(num_shards: int, lanes: int, world: int, expected: int | None) -> None:
    assert first_lanes(num_shards, lanes, world) == expected


def test_what_cannot_be_exact_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_lost_chunks does not go with"):
        lazy(folder, max_lost_chunks=1)
    with pytest.raises(ConfigError, match="on_no_range: stream does not go with"):
        lazy(folder, on_no_range="stream")
    packed = write_tar(tmp_path / "a.tar.gz", map(good, range(9)), "w:gz")
    with pytest.raises(ConfigError, match="cannot be indexed at all"):
        lazy(str(packed))
    with pytest.raises(ConfigError, match=r"3 shard\(s\) are too few for 4 processes"):
        stream(write_shards(tmp_path / "few", [9, 9, 9]), 12, World(0, 4), index="lazy")
    with pytest.raises(ConfigError, match=r"begun with data\.index: lazy"):
        stream(folder, 12, saved=lazy(folder).state(0))
    with pytest.raises(ConfigError, match=r"begun with data\.index: eager"):
        lazy(folder, saved=stream(folder, 12).state(0))
    with pytest.raises(DataError, match="1 of 2 shards cannot be read"):
        lazy([str(folder / "00000.tar"), str(folder / "absent.tar")])  # type: ignore[arg-type]
    base = {"model": {"name": "ViT-B-32"}, "data": {"train": "x", "batch_size": 8, "index": "lazy"}}
    make_config({**base, "run": {"samples": 800}})
    with pytest.raises(ConfigError, match=r"run\.epochs needs the number of samples"):
        make_config({**base, "run": {"epochs": 1}})
