"""P3: kill -9 anywhere, the same command again, the same losses bit for bit."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.objectives.entries import ENTRIES
from tests.train.runs import columns, losses, trace, train, values, weights
from tests.train.test_one_big_batch import model

STEPS = 24


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at(config: dict[str, Any], world: int, step: int) -> None:
    """Starts the run on `world` ranks and kills all of them once metrics.jsonl holds `step` lines."""
    ranks = Ranks(world, train, config)
    metrics = Path(config["run"]["dir"]) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while lines(metrics) < step:
        assert time.monotonic() < deadline, "the run did not reach the step at which it is killed"
        assert all(process.is_alive() for process in ranks.processes) or lines(metrics) >= step
        time.sleep(0.002)
    ranks.kill()


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (3, 0)])
def test_killed_runs_continue_bit_for_bit(
    tiny_shards: Path, tmp_path: Path, world: int, workers: int
) -> None:
    # Dropout on, so that random states matter; two kills, the second in the resumed run.
    common = {"data__workers": workers}
    straight = values(tiny_shards, tmp_path / "straight", **common)
    broken = values(tiny_shards, tmp_path / "broken", **common)
    straight["model"] = broken["model"] = model("roberta_dropout")
    Ranks(world, train, straight).values()
    draw = random.Random(world * 10 + workers)
    for step in sorted(draw.sample(range(2, STEPS - 2), 2)):
        kill_at(broken, world, step)
    Ranks(world, train, broken).values()
    assert trace(tmp_path / "broken") == trace(tmp_path / "straight")
    assert len(trace(tmp_path / "straight")) == STEPS
    assert weights(tmp_path / "broken") == weights(tmp_path / "straight")


def test_workers_do_not_change_the_losses(tiny_shards: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        config = values(tiny_shards, tmp_path / str(workers), data__workers=workers)
        config["model"] = model("roberta_dropout")
        Ranks(1, train, config).values()
    assert trace(tmp_path / "0") == trace(tmp_path / "2")


def test_ranks_do_not_change_the_losses(tiny_shards: Path, tmp_path: Path) -> None:
    for world in (1, 2):
        config = values(tiny_shards, tmp_path / str(world), run__steps=20, data__lanes=4)
        Ranks(world, train, config).values()
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 20
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-5


def test_a_finished_run_only_exports_again(tiny_shards: Path, tmp_path: Path) -> None:
    config = values(tiny_shards, tmp_path / "run", run__steps=4)
    Ranks(1, train, config).values()
    before = trace(tmp_path / "run")
    (again,) = Ranks(1, train, config).values()
    assert again["steps"] == 4
    assert trace(tmp_path / "run") == before


def test_queues_averages_and_prototypes_continue_bit_for_bit(tiny_shards: Path, tmp_path: Path) -> None:
    objectives = [ENTRIES[name] for name in ("clip", "moco", "pcl", "byol", "swav, queue")]
    # They read one average, so they must mean the same by it.
    objectives[3] = {**objectives[3], "schedule": "constant"}
    straight, broken = (values(tiny_shards, tmp_path / name) for name in ("straight", "broken"))
    straight["objectives"] = broken["objectives"] = objectives
    Ranks(2, train, straight).values()
    for step in (7, 16):
        kill_at(broken, 2, step)
    Ranks(2, train, broken).values()
    assert trace(tmp_path / "broken") == trace(tmp_path / "straight")
    assert weights(tmp_path / "broken") == weights(tmp_path / "straight")
    found = columns(tmp_path / "straight")
    terms = {"loss/clip", "loss/moco", "loss/pcl", "loss/byol", "loss/swav"}
    assert terms == {name for name in found if name.startswith("loss/")}
    assert found["queue_filled/moco"][0] == 0.0
    assert found["queue_filled/moco"][-1] == 1.0
    assert found["queue_age/moco"][0] == 0 < found["queue_age/moco"][-1]
