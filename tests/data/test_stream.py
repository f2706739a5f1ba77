"""Sources without random access: webdataset's reader, labelled inexact, counted, never unpickling."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clipkit.dist import World
from clipkit.types import ConfigError, DataError
from tests.data.makers import good, png, same, stream, take, write_shards, write_tar


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """60 samples in three gzip shards."""
    folder = tmp_path_factory.mktemp("packed")
    numbers = [range(31), range(31, 40), range(40, 60)]
    return [
        str(write_tar(folder / f"{shard}.tar.gz", map(good, part), "w:gz"))
        for shard, part in enumerate(numbers)
    ]


def test_gzip_is_labelled_inexact_and_complete(packed: list[str]) -> None:
    opened = stream(packed, 6)
    assert opened.exact is False
    assert opened.describe()["exact"] is False
    assert opened.state(13)["exact"] is False
    assert (opened.num_samples, opened.steps_per_epoch) == (60, 10)
    epochs = [
        [int(key) for batch in take(opened, first, first + 10) for key in batch.keys] for first in (0, 10)
    ]
    for keys in epochs:
        assert sorted(keys) == list(range(60))
    assert epochs[0] != epochs[1] != sorted(epochs[1])


def test_a_folder_of_gzip_shards(packed: list[str]) -> None:
    assert stream(Path(packed[0]).parent, 6).num_samples == 60


def test_seeded_and_repeatable(packed: list[str]) -> None:
    reference = take(stream(packed, 6), 0, 14)
    assert same(take(stream(packed, 6), 0, 14), reference)
    assert same(take(stream(packed, 6, saved=stream(packed, 6).state(4)), 4, 14), reference[4:])
    assert not same(take(stream(packed, 6, seed=6), 0, 14), reference)


def test_ranks_and_workers_share_the_samples(packed: list[str]) -> None:
    """No sample twice and none lost in an epoch, whatever the number of ranks and workers."""
    for size, workers in [(2, 0), (3, 2), (1, 3)]:
        keys = []
        for rank in range(size):
            batches = take(stream(packed, 6, World(rank, size), workers=workers), 0, 10)
            assert {len(batch) for batch in batches} == {6 // size}
            keys += [int(key) for batch in batches for key in batch.keys]
        assert sorted(keys) == list(range(60))


def test_bad_samples_are_counted(tmp_path: Path) -> None:
    samples = [good(n) if n % 5 else [(f"{n:06d}.txt", b"no image")] for n in range(30)]
    path = write_tar(tmp_path / "a.tar.gz", samples, "w:gz")
    batches = take(stream(str(path), 6), 0, 5)
    assert all(len(batch) == 6 for batch in batches)
    rejects = [reject for batch in batches for reject in batch.rejects]
    assert len({reject.key for reject in rejects}) == 6
    assert {reject.reason for reject in rejects} == {"missing image"}
    bad = write_tar(tmp_path / "b.tar.gz", [[(f"{n}.txt", b"x")] for n in range(9)], "w:gz")
    with pytest.raises(DataError, match="4 unusable samples in a row"):
        take(stream(str(bad), 3, max_consecutive=4), 0, 1)


def test_a_cut_gzip_is_an_error(packed: list[str], tmp_path: Path) -> None:
    data = Path(packed[0]).read_bytes()
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"cut\.tar\.gz"):
        stream(str(cut), 2)
    cut.write_bytes(gzip.compress(b"not a tar"))
    with pytest.raises(DataError, match=r"cut\.tar\.gz"):
        stream(str(cut), 2)


def test_too_few_samples(packed: list[str]) -> None:
    with pytest.raises(ConfigError, match="larger than the set of 60"):
        stream(packed, 61)
    with pytest.raises(ConfigError, match="not a multiple of the 4 processes"):
        stream(packed, 6, World(0, 4))


def test_an_exact_run_does_not_continue_inexactly(packed: list[str], tmp_path: Path) -> None:
    exact = stream(write_shards(tmp_path / "set", [60]), 6)
    with pytest.raises(ConfigError, match="exact: True -> False"):
        stream(packed, 6, saved=exact.state(2))


def test_ranks_count_once(packed: list[str], run_ranks: Callable[..., list[Any]]) -> None:
    keys = run_ranks(2, _rank_keys, packed)
    assert sorted(keys[0] + keys[1]) == [f"{number:06d}" for number in range(60)]
    assert run_ranks(2, _rank_error, packed) == [True, True]


def _rank_keys(rank: int, world_size: int, shards: list[str]) -> list[str]:
    return [key for batch in take(stream(shards, 6, World(rank, world_size)), 0, 10) for key in batch.keys]


def _rank_error(rank: int, world_size: int, shards: list[str]) -> bool:
    with pytest.raises(DataError, match="missing"):
        stream([*shards, "missing.tar.gz"], 6, World(rank, world_size))
    return True


def test_images_are_those_of_the_shard(packed: list[str]) -> None:
    from clipkit.data.loader import LoaderOptions, Source, open_train
    from clipkit.data.views import ImageView

    view = ImageView(size=(8, 8), train=False)
    opened = open_train(LoaderOptions(Source(tuple(packed)), 6, 0), [view], [], World())
    (batch,) = take(opened, 0, 1)
    for row, key in enumerate(batch.keys):
        assert torch.equal(batch.images["image"][row], view(Image.open(io.BytesIO(png(int(key))))))
