"""`data.index: lazy` in a run: killed in the first epoch, damaged in it, and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import clipkit.data.remote
from clipkit.data.indexing import RECORDS
from clipkit.train import pretrain
from clipkit.types import DataError
from tests.conftest import Ranks, write_tiny_shards
from tests.data.servers import serving, status
from tests.train.runs import columns, trace, train, values, weights
from tests.train.test_resume import kill_at

STEPS, FIRST = 12, 7
"""The first epoch: two lanes of seven shards, the shorter one with 47 samples, six a step."""


def lazy_values(shards: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    given = {
        "data__index": "lazy",
        "data__lanes": 4,
        "run__steps": STEPS,
        "run__checkpoint_every": 2,
        **changes,
    }
    return values(shards, folder, **given)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_tiny_shards(tmp_path / "shards", per_shard=7)


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0)])
def test_killed_runs_continue_bit_for_bit(shards: Path, tmp_path: Path, world: int, workers: int) -> None:
    apart = write_tiny_shards(tmp_path / "apart" / "shards", per_shard=7)
    straight = lazy_values(shards, tmp_path / "straight", data__workers=0)
    broken = lazy_values(apart, tmp_path / "broken", data__workers=workers)
    Ranks(world, train, straight).values()
    kill_at(broken, world, 4)
    assert list((apart / RECORDS).glob("*.npz"))
    assert not list(apart.glob(".clipkit-index*"))
    Ranks(world, train, broken).values()
    assert trace(tmp_path / "broken") == trace(tmp_path / "straight")
    assert len(trace(tmp_path / "straight")) == STEPS
    assert not (apart / RECORDS).exists()
    assert weights(tmp_path / "broken") == weights(tmp_path / "straight")


def test_a_damaged_shard_ends_the_run_which_continues_once_it_is_repaired(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = {path: path.read_bytes() for path in shards.glob("*.tar")}
    straight = pretrain(lazy_values(shards, tmp_path / "straight"))
    assert straight["steps"] == STEPS
    said = capfd.readouterr().err
    assert "14 shards, indexed while the first epoch is read; exact order, shard-level" in said
    assert f"the first epoch ended after step {FIRST}; indexing" in said
    assert "the first epoch read 84 of 96 samples" in said
    apart = write_tiny_shards(tmp_path / "apart" / "shards", per_shard=7)
    config = lazy_values(apart, tmp_path / "broken")
    for path in apart.glob("*.tar"):
        path.write_bytes(path.read_bytes()[:9000])
    # The first one is looked at before the first step.
    (apart / "00000.tar").write_bytes(whole[shards / "00000.tar"])
    with pytest.raises(DataError, match=r"\.tar: .* at byte \d+, after member '\d+\.\w+'") as caught:
        pretrain(config)
    assert caught.value.exit_code == 3
    for path in apart.glob("*.tar"):
        path.write_bytes(whole[shards / path.name])
    pretrain(config)
    assert trace(tmp_path / "broken") == trace(tmp_path / "straight")


def test_reads_that_were_tried_again_are_logged(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clipkit.data.remote, "RETRIES", (0.0, 0.0, 0.0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # The faults are meant for reads of the training itself.
    monkeypatch.setattr("clipkit.train.setup.look_at_data", lambda *_: [])
    monkeypatch.setattr("clipkit.train.setup.count_captions", lambda *_: ([], []))
    with serving(shards) as server:
        config = values(shards, tmp_path / "run", run__steps=8, run__log_every=4, data__workers=1)
        config["data"]["train"] = f"{server.url}/{{00000..00013}}.tar"
        pretrain({**config, "run": {**config["run"], "dir": str(tmp_path / "first"), "steps": 1}})
        server.faults.extend([lambda request: False] * 14 + [status(503)] * 2)
        pretrain(config)
    found = columns(tmp_path / "run")
    assert sum(found["read_retries"]) == 2
    records = (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()
    assert not any("read_retries" in json.loads(line) for line in records)
