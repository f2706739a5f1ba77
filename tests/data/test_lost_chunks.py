"""Chunks out of reach: the run stops, or their samples are replaced in their own slots and counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import clipkit.data.remote
from clipkit.data.loader import RejectBudget, TrainStream
from clipkit.data.rejects import LOST_CHUNK
from clipkit.data.source import Unreadable
from clipkit.data.tar_index import Index
from clipkit.dist import World
from clipkit.types import DataError, Reject
from tests.data.makers import same, stream, take, write_shards
from tests.data.servers import serving


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No waiting, and a cache of its own."""
    monkeypatch.setattr(clipkit.data.remote, "RETRIES", (0.0,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("lost") / "set", [60, 60])


def broken(index: Index, shard: int, sample: int) -> Callable[[Any], bool]:
    """A fault: every range that holds this sample of a shard cannot be read."""
    _, _, low, high = index.span(shard, sample, sample)

    def fault(request: Any) -> bool:
        first, last = (int(part) for part in request.headers["Range"].removeprefix("bytes=").split("-"))
        if request.path.startswith(f"/{shard:05d}.tar") and last > 0 and first < high and last >= low:
            request.reply(503, b"")
            return True
        return False

    return fault


def index_of(opened: TrainStream) -> Index:
    return opened._reader.index  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize(("batch_size", "lanes"), [(12, 2), (8, 8)])
def test_lost_samples_are_replaced_in_their_slots(folder: Path, batch_size: int, lanes: int) -> None:
    reference = take(stream(folder, batch_size, lanes=lanes), 0, 120 // batch_size)
    with serving(folder) as server:
        spec = f"{server.url}/{{00000..00001}}.tar"
        opened = stream(spec, batch_size, lanes=lanes, max_lost_chunks=1)
        chunk = opened.describe()["chunk_size"]
        server.always = broken(index_of(opened), 0, 30)
        batches = take(opened, 0, len(reference))
        # Two ranks lose the same samples to the same substitutes, in the same slots.
        halves = [
            take(stream(spec, batch_size, World(rank, 2), lanes=lanes, max_lost_chunks=1), 0, len(batches))
            for rank in range(2)
        ]
    assert [a.keys + b.keys for a, b in zip(*halves, strict=True)] == [batch.keys for batch in batches]
    replaced = []
    for batch, whole in zip(batches, reference, strict=True):
        moved = torch.nonzero(batch.ids != whole.ids).flatten().tolist()
        replaced += [int(whole.ids[row]) for row in moved]
        assert {reject.slot for reject in batch.rejects} == {int(batch.slots[row]) for row in moved}
        assert all(reject.reason == LOST_CHUNK for reject in batch.rejects)
        for row in set(range(batch_size)) - set(moved):
            assert torch.equal(batch.images["image"][row], whole.images["image"][row])
    lost = [reject for batch in batches for reject in batch.rejects]
    assert 30 in replaced
    assert len(set(replaced)) == len(lost) <= chunk
    assert set(replaced) <= set(range(30 // chunk * chunk, 30 // chunk * chunk + chunk))
    assert sorted(reject.key for reject in lost) == sorted(f"sample {number}" for number in replaced)
    budget = RejectBudget(0.0, 2, max_lost_chunks=1)
    budget.add(lost, 120)
    budget.end_of_epoch()
    assert len(budget.lost_chunks) == 1


def test_without_leave_the_first_loss_stops(folder: Path) -> None:
    with serving(folder) as server:
        spec = f"{server.url}/{{00000..00001}}.tar"
        opened = stream(spec, 12)
        first = broken(index_of(opened), 0, 30)
        server.always = first
        with pytest.raises(Unreadable, match=r"HTTP 503; 2 attempts\)\ncheck the storage"):
            take(opened, 0, 10)
        second = broken(index_of(opened), 1, 5)
        server.always = lambda request: first(request) or second(request)
        opened = stream(spec, 12, max_lost_chunks=1)
        with pytest.raises(Unreadable, match=r"more than data\.max_lost_chunks=1 chunks are lost"):
            take(opened, 0, 10)
        assert len(take(stream(spec, 12, max_lost_chunks=2), 0, 10)) == 10


def test_the_limit_holds_over_ranks_and_restarts() -> None:
    budget = RejectBudget(0.01, 5, max_lost_chunks=1)
    loss = [Reject(f"sample {n}", "a.tar", LOST_CHUNK, "samples 0 to 63", n, "x") for n in range(64)]
    budget.add(loss, 64)
    budget.add(loss, 64)
    copy = RejectBudget(0.01, 5, max_lost_chunks=1)
    copy.load_state(json.loads(json.dumps(budget.state())))
    for counting in (budget, copy):
        with pytest.raises(DataError, match=r"2 chunks are lost, data\.max_lost_chunks=1 allowed; one"):
            counting.add([Reject("sample 64", "a.tar", LOST_CHUNK, "samples 64 to 127", 0, "x")], 64)
    old = budget.state()
    del old["lost_chunks"]
    copy.load_state(old)
    assert copy.lost_chunks == set()


def test_a_disk_that_fails_is_treated_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = stream(folder, 12, max_lost_chunks=10)
    monkeypatch.setattr(clipkit.data.source, "RETRIES", ())

    def fail(*_: Any) -> bytes:
        raise OSError(5, "Input/output error")

    healthy = take(stream(folder, 12), 0, 10)
    assert same(take(opened, 0, 10), healthy)
    monkeypatch.setattr(clipkit.data.source.os, "pread", fail)
    with pytest.raises(DataError, match="Input/output error"):
        take(stream(folder, 12, max_lost_chunks=10), 0, 10)
