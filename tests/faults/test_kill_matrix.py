"""kill -9 everywhere: during training, at every call of a save, in and after evaluations; two towers drop.

The whole matrix is one slow command, `pytest -n 0 -m slow tests/faults/test_kill_matrix.py --fault-table`,
whose last result stands in examples/guides/faults.md. `test_kills.py` holds the part that every run repeats.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.evaluation.layouts import captioned_csv
from tests.faults.killing import (
    check_left,
    check_same,
    die_in_evaluation,
    die_in_save,
    dropping,
    run_until_killed,
    run_until_step,
)
from tests.train.runs import trace, train, values

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

MOST_CALLS = 200


def configured(shards: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    config = values(shards, folder, **changes)
    config["model"] = dropping()
    return config


@pytest.fixture
def straight(tiny_shards: Path, tmp_path: Path) -> Callable[..., dict[int, str]]:
    """Returns a function that runs without a kill, into "straight", and returns the losses."""

    def run(world: int, **changes: Any) -> dict[int, str]:
        Ranks(world, train, configured(tiny_shards, tmp_path / "straight", **changes)).values()
        return trace(tmp_path / "straight")

    return run


# 8 steps an epoch: two in the middle of each, the first and last batches of epochs, and the very first.
MOMENTS = [(1, 3, 7, 8, 9, 12, 15, 16, 17, 18, 21, 23), (2, 4, 5, 8, 10, 13, 16, 17, 19, 20, 22, 23)]


@pytest.mark.parametrize(("world", "workers", "moments"), [(1, 0, 0), (1, 2, 1), (3, 0, 0), (3, 1, 1)])
@pytest.mark.fault(
    "F1",
    "kill -9 of all processes at 48 seeded moments of steps, W = 1 and 3, loader workers 0 to 2",
    "each time the same command goes on: losses and weights equal the uninterrupted run's bit for bit",
)
def test_f01_kills_during_training(
    tiny_shards: Path,
    tmp_path: Path,
    record_property: Any,
    world: int,
    workers: int,
    moments: int,
    straight: Any,
) -> None:
    began, expected = time.monotonic(), straight(world)
    draw = random.Random(10 * world + moments)
    config = configured(tiny_shards, tmp_path / "broken", data__workers=workers)
    for step in MOMENTS[moments]:
        run_until_step(config, world, step, draw)
        check_left(tmp_path / "broken", expected)
    Ranks(world, train, config).values()
    check_same(tmp_path / "broken", tmp_path / "straight")
    record_property(
        "measured",
        f"W = {world}, {workers} workers: {len(MOMENTS[moments])} kills in {time.monotonic() - began:.0f} s",
    )


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(("world", "victim"), [(1, 0), (3, 0), (3, 1)])
@pytest.mark.fault(
    "F2",
    "kill -9 before every call to the disk of a save (open, fsync, rename, remove ...), in the background "
    "and in the foreground, of the only process, of rank 0 and of rank 1 of 3",
    "the run continues from the last complete checkpoint, never with an error: same losses, same weights",
)
def test_f02_kills_at_every_call_of_a_save(
    tiny_shards: Path,
    tmp_path: Path,
    record_property: Any,
    world: int,
    victim: int,
    background: bool,
    straight: Any,
) -> None:
    began = time.monotonic()
    # Every process saves at its second step, in which it dies. Kills after the rename let the run advance:
    # its 40 saves end the list: 4 calls set `latest`, and each pruned checkpoint takes about 10.
    changes = {"run__steps": 80, "run__checkpoint_every": 2, "run__background_save": background}
    changes["run__weight_ema"] = False
    expected = straight(world, **changes)
    config = configured(tiny_shards, tmp_path / "broken", **changes)
    for number in range(1, MOST_CALLS):
        if not run_until_killed(config, world, victim, die_in_save, number):
            break
        check_left(tmp_path / "broken", expected)
    check_same(tmp_path / "broken", tmp_path / "straight")
    assert (5 if victim else 60) < number < MOST_CALLS
    how = "background" if background else "foreground"
    record_property(
        "measured",
        f"W = {world}, rank {victim}, {how}: {number - 1} kills in {time.monotonic() - began:.0f} s",
    )


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.fault(
    "F3",
    "kill -9 before, inside and right after evaluations, before and after their line in the log",
    "the evaluation is made up for or kept, once; losses, weights and evaluated numbers are those of the "
    "uninterrupted run",
)
def test_f03_kills_in_and_after_evaluations(
    tiny_shards: Path, tmp_path: Path, record_property: Any, world: int, straight: Any
) -> None:
    began = time.monotonic()
    data = str(captioned_csv(tmp_path / "set", [[f"picture {number}"] for number in range(150)]))
    changes = {
        "run__steps": 32,
        "run__checkpoint_every": 4,
        "run__evaluate_every": 4,
        "run__evaluate": [{"task": "retrieval", "data": data}],
    }
    expected = straight(world, **changes)
    config = configured(tiny_shards, tmp_path / "broken", **changes)
    kills = 0
    for moment in ("before", "inside", "unlogged", "logged") * 2:
        for victim in {0, world - 1} if moment in ("before", "inside") else {0}:
            assert run_until_killed(config, world, victim, die_in_evaluation, moment), moment
            check_left(tmp_path / "broken", expected)
            kills += 1
    Ranks(world, train, config).values()
    check_same(tmp_path / "broken", tmp_path / "straight")
    assert evaluations(tmp_path / "broken") == evaluations(tmp_path / "straight")
    record_property("measured", f"W = {world}: {kills} kills in {time.monotonic() - began:.0f} s")


def evaluations(folder: Path) -> list[tuple[int, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["results"]) for line in lines if line.get("event") == "evaluation"]
