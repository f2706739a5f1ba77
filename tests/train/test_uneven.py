"""data.uneven: a run goes on with numbers of processes that do not divide its lanes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit import dist
from clipkit.config import make_config
from clipkit.data.loader import TrainStream
from clipkit.dist import World
from clipkit.train import pretrain
from clipkit.train.setup import check_world
from clipkit.types import Batch, ConfigError
from tests.conftest import Ranks
from tests.train.runs import columns, values

Rows = dict[int, list[tuple[str, int]]]


def recorded(rank: int, world: int, config: dict[str, Any], resume: str = "auto") -> Rows:
    """Runs `pretrain` on one rank; returns key and sum of pixels of its rows by step, as they were built."""
    found: Rows = {}
    batches = TrainStream.batches

    def spy(self: TrainStream, start: int, stop: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches(self, start, stop), start):
            pixels = batch.images["image"].sum((1, 2, 3)).tolist()
            found[number] = list(zip(batch.keys, pixels, strict=True))
            yield batch

    TrainStream.batches = spy  # type: ignore[method-assign]
    pretrain(config, resume=resume)
    return found


@pytest.fixture(scope="module")
def alone(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    """A run of 10 steps of 8 samples in one process, with a checkpoint after the fifth."""
    folder = tmp_path_factory.mktemp("uneven") / "alone"
    config = values(tiny_shards, folder, data__batch_size=8, run__steps=10)
    (rows,) = Ranks(1, recorded, config).values()
    return folder, rows


def test_three_processes_continue_a_run_of_one(
    tiny_shards: Path, tmp_path: Path, alone: tuple[Path, Rows]
) -> None:
    folder, rows = alone
    # Ranks of 2, 3 and 3 rows: micro-batches of 2 split those of two ranks only.
    changes = {"data__batch_size": 8, "run__steps": 10, "data__uneven": True, "data__micro_batch": 2}
    config = values(tiny_shards, tmp_path / "three", **changes, run__diagnose_every=4)
    parts = Ranks(3, recorded, config, str(folder / "checkpoints" / "step-00000005")).values()
    assert [len(part[5]) for part in parts] == [2, 3, 3]
    for number in range(5, 10):
        assert [row for part in parts for row in part[number]] == rows[number]
    expected, found = columns(folder), columns(tmp_path / "three")
    assert found["step"] == [6, 7, 8, 9, 10]
    for name in ("loss", "loss/clip", "accuracy/clip", "grad_norm"):
        assert found[name] == pytest.approx(expected[name][5:], abs=1e-6 if name != "grad_norm" else 1e-4)
    (event,) = (
        record
        for record in map(json.loads, (tmp_path / "three" / "metrics.jsonl").read_text().splitlines())
        if record.get("event") == "processes"
    )
    assert (event["step"], event["from"], event["to"], event["rows"]) == (5, 1, 3, [2, 3, 3])
    assert "losses equal up to floating-point order" in event["holds"]


def test_other_numbers_of_processes_are_refused_with_both_cures(tmp_path: Path) -> None:
    config = make_config(values(tmp_path, tmp_path / "run", data__batch_size=8))
    for saved in (None, {"lanes": 8}):
        with pytest.raises(ConfigError, match=r"1, 2, 4, 8; data\.uneven=true takes any up to 8") as refused:
            check_world(config, World(0, 3), saved)
        assert refused.value.exit_code == 2
    changes = {"data__batch_size": 8, "data__uneven": True, "run__world_size": 3}
    uneven = make_config(values(tmp_path, tmp_path / "run", **changes))
    check_world(uneven, World(0, 3))
    check_world(uneven, World(0, 3), {"lanes": 8})
    with pytest.raises(ConfigError, match="the number of lanes, 2, is not a multiple of the 3 processes"):
        check_world(uneven, World(0, 3), {"lanes": 2})
    assert not config.differences(uneven)


def gathers_other_rows(rank: int, world: int) -> list[str]:
    """What `gather` says to rows that are none of the batch, and to two views in one tensor."""
    said = []
    with dist.uneven((2, 3)):
        mine = torch.full((2 * (2 + rank), 1), float(rank))
        assert dist.gather(mine).flatten().tolist() == [0.0] * 4 + [1.0] * 6
        assert dist.first_row(mine) == 4 * rank
        assert float(dist.all_reduce_mean(torch.tensor(float(rank)))) == pytest.approx(3 / 5)
        try:
            dist.gather(torch.ones(1))
        except ConfigError as error:
            said.append(str(error))
    assert dist.gather(torch.ones(1)).tolist() == [1.0, 1.0]
    return said


def test_only_rows_of_the_batch_are_gathered(run_ranks: Any) -> None:
    for said in run_ranks(2, gathers_other_rows):
        assert "1 rows to gather on a rank with" in said[0]
