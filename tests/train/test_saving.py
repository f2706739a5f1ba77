"""Checkpoints in the background: of the step at which they were begun, whatever happens meanwhile."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit.checkpoint import CheckpointStore
from clipkit.dist import World
from clipkit.train import pretrain
from clipkit.train.loop import Loop
from clipkit.types import DataError
from tests.conftest import Ranks
from tests.train.runs import losses, trace, train, values, weights

STEPS = {"run__steps": 8, "run__checkpoint_every": 4}


def slow_save(run: Path, steps: int) -> Any:
    """Returns a `save` that begins to write only after the run has gone on for some steps."""
    save = CheckpointStore.save

    def delayed(self: CheckpointStore, step: int, **parts: Any) -> Path:
        deadline = time.monotonic() + 60
        while step < 8 and len(losses(run)) < step + steps:
            if time.monotonic() > deadline:
                raise AssertionError("the training waited for the checkpoint")
            time.sleep(0.01)
        return save(self, step, **parts)

    return delayed


def slowly(rank: int, world: int, config: dict[str, Any], steps: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CheckpointStore, "save", slow_save(Path(config["run"]["dir"]), steps))
        pretrain(config)


@pytest.mark.parametrize("world", [1, 2])
def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(
    tiny_shards: Path, tmp_path: Path, world: int
) -> None:
    straight = values(tiny_shards, tmp_path / "straight", run__background_save=False, **STEPS)
    behind = values(tiny_shards, tmp_path / "behind", **STEPS)
    for config in (straight, behind):
        config["objectives"] = [{"name": "clip"}, {"name": "moco", "queue": 24, "hidden": 8, "dim": 4}]
    Ranks(world, train, straight).values()
    Ranks(world, slowly, behind, 3).values()
    assert trace(tmp_path / "behind") == trace(tmp_path / "straight")
    stores = [CheckpointStore(tmp_path / name / "checkpoints", World()) for name in ("straight", "behind")]
    one, other = (store.open(store.folder / "step-00000004") for store in stores)
    for stem in ("model", "optimizer"):
        wanted, found = one.tensors(stem), other.tensors(stem)
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    ignored = {"seconds", "logs"}  # times, and lines with them
    trainers = [
        {key: value for key, value in found.document("trainer").items() if key not in ignored}
        for found in (one, other)
    ]
    assert trainers[0] == trainers[1]
    assert weights(tmp_path / "behind") == weights(tmp_path / "straight")


def test_a_run_that_fails_ends_the_checkpoint_that_it_writes(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = CheckpointStore.save

    def slow(self: CheckpointStore, step: int, **parts: Any) -> Path:
        time.sleep(2)
        return save(self, step, **parts)

    def fails(self: Loop, *_: Any) -> None:
        if self.state.step == 3:
            assert self.saver.busy, "the checkpoint of step 2 is being written"
            raise DataError("a shard is gone", "bring it back")

    monkeypatch.setattr(CheckpointStore, "save", slow)
    monkeypatch.setattr(Loop, "_log", fails)
    with pytest.raises(DataError):
        pretrain(values(tiny_shards, tmp_path / "run", run__checkpoint_every=2))
    newest = CheckpointStore(tmp_path / "run" / "checkpoints", World()).newest()
    assert newest is not None
    assert newest.step == 2
