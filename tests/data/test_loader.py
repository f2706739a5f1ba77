"""The stream: equal batches for every number of ranks and workers, from any start; bad samples replaced."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.data.loader import CaptionField, LoaderOptions, RejectBudget, Source, open_train
from clipkit.data.order import divisors
from clipkit.data.views import ImageView
from clipkit.dist import World
from clipkit.types import DataError, Reject
from tests.data.makers import (
    NoisyView,
    global_batches,
    global_run,
    good,
    png,
    same,
    stream,
    take,
    write_shards,
    write_tar,
)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 samples in five uneven shards."""
    return write_shards(tmp_path_factory.mktemp("uneven"), [37, 1, 50, 9, 23])


@pytest.mark.parametrize("batch_size", [1, 7, 8, 12, 60, 120])
def test_every_world_builds_the_same_batches(uneven: Path, batch_size: int) -> None:
    reference = take(stream(uneven, batch_size), 0, 2 * (120 // batch_size))
    for size in divisors(batch_size):
        if size in (2, 3, 4, 7, 12):
            assert same(global_run(uneven, batch_size, size, 0, len(reference)), reference)
    ids = torch.cat([batch.ids for batch in reference[: len(reference) // 2]])
    assert len(ids) == len(ids.unique()) == 120 // batch_size * batch_size
    for batch in reference:
        assert [int(key) for key in batch.keys] == batch.ids.tolist()
        assert len(batch) == batch_size


@pytest.mark.parametrize(("lanes", "size", "workers"), [(None, 5, 0), (4, 3, 2)])
def test_uneven_ranks_build_the_same_batches(
    uneven: Path, lanes: int | None, size: int, workers: int
) -> None:
    reference = take(stream(uneven, 12, lanes=lanes), 0, 10)
    state = stream(uneven, 12, lanes=lanes).state(0)
    found = global_run(uneven, 12, size, 0, len(reference), uneven=True, saved=state, workers=workers)
    assert same([replace(batch, shares=()) for batch in found], reference)
    (alone,) = take(stream(uneven, 12, World(size - 1, size), uneven=True, lanes=lanes), 0, 1)
    assert len(alone.shares) == size
    assert sum(alone.shares) == 12
    assert alone.shares[-1] == len(alone)
    assert alone.rows(0, 1).shares == ()


def test_rows_are_the_samples_they_claim(uneven: Path) -> None:
    """Image and caption of a row belong to its key; slots count the rows of the epoch."""
    opened = open_train(
        LoaderOptions(Source(str(uneven)), 8, 0),
        [ImageView(size=(8, 8), train=False)],
        [stream(uneven, 8)._recipe.text_views[0]],
        World(),
    )
    for step, batch in enumerate(opened.batches(0, 30)):
        assert batch.slots.tolist() == list(range(step % 15 * 8, step % 15 * 8 + 8))
        for row, number in enumerate(batch.ids.tolist()):
            text = bytes(batch.texts["text"][row].tolist()[: len(f"caption {number}")]).decode()
            assert text == f"caption {number}"
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3)).astype(np.uint8)
            assert np.array_equal(batch.images["image"][row].permute(1, 2, 0).numpy(), pixels)


def test_texts_are_trimmed_to_the_batch(uneven: Path) -> None:
    batch = next(iter(stream(uneven, 8).batches(0, 1)))
    assert batch.texts["text"].shape == (8, 16)
    assert batch.texts["text"].dtype == torch.int64


def test_one_shard_serves_many_ranks_and_workers(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "set", [40])
    assert same(global_run(shards, 8, 2, 0, 5, workers=3), global_run(shards, 8, 1, 0, 5))


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(("batch_size", "lanes"), [(8, None), (12, 2), (2, None)])
def test_workers_change_nothing(uneven: Path, workers: int, batch_size: int, lanes: int | None) -> None:
    """Tensors, keys and texts are identical, with fewer lanes than workers too."""
    stop = 120 // batch_size + 3
    alone = take(stream(uneven, batch_size, lanes=lanes), 0, stop)
    assert same(take(stream(uneven, batch_size, lanes=lanes, workers=workers), 0, stop), alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_step_can_be_the_first(uneven: Path, workers: int) -> None:
    """A stream that starts anywhere continues as if it had never stopped, across epochs and worlds."""
    whole = take(stream(uneven, 14), 0, 20)
    for start in (1, 7, 8, 9, 15, 19):
        assert same(take(stream(uneven, 14, workers=workers), start, 20), whole[start:])
    first = stream(uneven, 14, lanes=14)
    state = first.state(11)
    assert (state["epoch"], state["batch_in_epoch"]) == (1, 3)
    later = [stream(uneven, 14, World(rank, 2), saved=state, workers=workers) for rank in range(2)]
    assert same(global_batches([take(opened, 11, 20) for opened in later]), whole[11:])


def test_starting_late_is_cheap(tmp_path: Path) -> None:
    """The last step of a late epoch reads no more than its windows: position is arithmetic, not replay."""
    shards = write_shards(tmp_path / "set", [1500, 1500])
    size = sum(path.stat().st_size for path in shards.glob("*.tar"))
    opened = stream(shards, 8, window_bytes=size // 10)
    reader: Any = opened._reader
    reads: list[int] = []
    plain = reader._source.read
    reader._source.read = lambda shard, begin, end: (reads.append(end - begin), plain(shard, begin, end))[1]
    last = 1000 * opened.steps_per_epoch - 1
    (batch,) = take(opened, last, last + 1)
    assert len(batch) == 8
    assert 0 < sum(reads) < 0.2 * size


def test_generators_are_left_alone(uneven: Path) -> None:
    """Building batches, with and without workers, does not shift the model's randomness."""

    def states() -> list[Any]:
        return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]

    for workers in (0, 1):
        opened = stream(uneven, 8, workers=workers)
        before = states()
        batches = opened.batches(0, 4)
        for _ in range(3):
            next(batches)
            assert states() == before
        opened.close()
        assert states() == before


def test_augmentation_follows_seed_epoch_slot_and_view(uneven: Path) -> None:
    def images(seed: int, step: int, name: str = "image", views: int = 1) -> torch.Tensor:
        wanted = [NoisyView(name=name, size=(8, 8), scale=(0.2, 1.0))]
        wanted += [ImageView(name=f"other {n}", size=(6, 10)) for n in range(views - 1)]
        opened = open_train(LoaderOptions(Source(str(uneven)), 120, seed), wanted, [], World())
        (batch,) = take(opened, step, step + 1)
        assert not batch.texts
        return batch.images[name][batch.ids.argsort()]

    reference = images(0, 0)
    assert torch.equal(images(0, 0), reference)
    assert torch.equal(images(0, 0, views=3), reference)
    for other in (images(1, 0), images(0, 1), images(0, 0, "second")):
        assert (other != reference).flatten(1).any(1).float().mean() > 0.9


# Bad samples.


def test_a_window_without_good_samples_borrows_from_the_set(tmp_path: Path) -> None:
    """N = B: every lane holds one sample, so a bad one takes the sample that follows it in the shards."""
    shards = write_shards(tmp_path / "set", [8], {7: [("000007.txt", b"no image")]})
    (batch,) = take(stream(shards, 8), 0, 1)
    assert [reject.substitute for reject in batch.rejects] == ["000000"]
    assert sorted(batch.ids.tolist()) == [0, 0, 1, 2, 3, 4, 5, 6]


def test_a_set_without_good_samples_ends(tmp_path: Path) -> None:
    bad = {number: [(f"{number:06d}.txt", b"x")] for number in range(9)}
    with pytest.raises(DataError, match="9 unusable samples in a row"):
        take(stream(write_shards(tmp_path / "set", [9], bad), 3), 0, 1)


def test_only_what_is_declared_is_required(tmp_path: Path) -> None:
    """Without text views captions may be missing, without image views images."""
    no_text = write_tar(tmp_path / "a.tar", [[(f"{n}.png", png(n))] for n in range(6)])
    opened = open_train(LoaderOptions(Source(str(no_text)), 3, 0), [ImageView(size=(8, 8))], [], World())
    assert all(not batch.rejects for batch in take(opened, 0, 2))
    no_image = write_tar(tmp_path / "b.tar", [[(f"{n}.txt", b"words")] for n in range(6)])
    view = stream(no_image, 3)._recipe.text_views[0]
    opened = open_train(LoaderOptions(Source(str(no_image)), 3, 0), [], [view], World())
    assert all(not batch.rejects and not batch.images for batch in take(opened, 0, 2))


def test_captions_from_json(tmp_path: Path) -> None:
    samples = [[(f"{n}.png", png(n)), (f"{n}.json", b'{"caption": "from json"}')] for n in range(4)]
    source = Source(str(write_tar(tmp_path / "a.tar", samples)), (CaptionField("json.caption"),))
    view = stream(tmp_path / "a.tar", 2)._recipe.text_views[0]
    (batch,) = take(open_train(LoaderOptions(source, 4, 0), [], [view], World()), 0, 1)
    assert bytes(batch.texts["text"][0, :9].tolist()) == b"from json"


# States and refusals.


def test_window_memory_is_bounded(uneven: Path) -> None:
    """The raw bytes held by a rank stay within data.window_bytes; the order still covers every sample."""
    sizes = [path.stat().st_size for path in uneven.glob("*.tar")]
    budget = sum(sizes) // 4
    opened = stream(uneven, 12, window_bytes=budget)
    reader: Any = opened._reader
    ids: list[int] = []
    for batch in opened.batches(0, 10):
        held = sum(len(window.samples) for window in reader._windows.values())
        assert held <= 120 / 4
        ids += batch.ids.tolist()
    assert sorted(ids) == list(range(120))


def test_ranks_with_a_process_group_agree(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    """The main rank indexes once; a damaged shard is the same DataError on every rank, no one waits."""
    shards = write_shards(tmp_path / "set", [20, 25])
    reference = take(stream(shards, 6), 0, 7)
    parts = run_ranks(3, _rank_ids, str(shards))
    joined = [[number for rows in step for number in rows] for step in zip(*parts, strict=True)]
    assert joined == [batch.ids.tolist() for batch in reference]
    with open(shards / "00001.tar", "r+b") as file:
        file.truncate(5000)
    assert run_ranks(2, _rank_error, str(shards)) == [3] * 2


def _rank_ids(rank: int, world_size: int, shards: str) -> list[list[int]]:
    return [batch.ids.tolist() for batch in take(stream(shards, 6, World(rank, world_size)), 0, 7)]


def _rank_error(rank: int, world_size: int, shards: str) -> int:
    with pytest.raises(DataError, match=r"00001\.tar") as caught:
        stream(shards, 6, World(rank, world_size))
    return caught.value.exit_code


def test_names_that_are_not_utf8_are_recorded_in_plain_text(tmp_path: Path) -> None:
    """Strict UTF-8 files hold the rejects; a name with other bytes would stop the run at every resume."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    for name in ("indexed.tar", "streamed.tar.gz"):
        bad = os.fsdecode(b"b\xe9d")
        members = [(f"{bad}.png", b"no image"), (f"{bad}.txt", b"caption")]
        folder.mkdir(exist_ok=True)
        shard = write_tar(folder / name, [good(0), members, good(2)], "w:gz" if name.endswith("gz") else "w")
        rejects = [found for batch in take(stream(str(shard), 3), 0, 1) for found in batch.rejects]
        assert [found.key for found in rejects] == ["b\\udce9d"], name
        for found in rejects:
            assert "caf\\udce9" in found.shard
            json.dumps(vars(found), ensure_ascii=False).encode()


# The budget of rejects.


def reject(slot: int) -> Reject:
    return Reject(f"key {slot}", "a.tar", "bad image", "cut", slot, "other")


def test_budget_waits_for_a_thousand_samples_or_an_epoch() -> None:
    budget = RejectBudget(0.01, 100)
    budget.add([reject(3)], 64)
    with pytest.raises(DataError, match=r"1 of 64 samples.*1.56%.*allowed 1.00%.*key 3 in a.tar"):
        budget.end_of_epoch()
    budget = RejectBudget(0.01, 100)
    budget.add([reject(3)], 999)
    budget.add([], 1)
    budget.end_of_epoch()
    budget.add([reject(7)], 100)
    with pytest.raises(DataError, match=r"rejects\.jsonl"):
        budget.add([reject(slot) for slot in range(20, 60, 2)], 10)


def test_budget_counts_runs_across_batches() -> None:
    budget = RejectBudget(1.0, 5)
    budget.add([reject(slot) for slot in (60, 61, 63, 62)], 64)
    copy = RejectBudget(1.0, 5)
    copy.load_state(budget.state())
    assert copy.state() == budget.state()
    for counting in (budget, copy):
        with pytest.raises(DataError, match="5 unusable samples in a row"):
            counting.add([reject(64)], 64)
    budget = RejectBudget(1.0, 5)
    budget.add([reject(slot) for slot in range(0, 100, 2)], 100)
    budget.add([reject(slot) for slot in (100, 101, 102, 104)], 100)


def test_image_of_one_pixel_row_is_usable(tmp_path: Path) -> None:
    out = tmp_path / "wide.png"
    Image.new("RGB", (90, 1)).save(out)
    shards = write_tar(tmp_path / "a.tar", [[("1.png", out.read_bytes()), ("1.txt", b"wide")]])
    (batch,) = take(stream(shards, 1), 0, 1)
    assert batch.images["image"].shape == (1, 3, 8, 8)
