"""Setting up a run: what must lie where before the first collective."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clipkit.config import make_config
from clipkit.learner import Learner
from clipkit.train import setup
from clipkit.types import Batch
from tests.train.runs import values


class Reached(Exception):
    pass


def test_the_trial_runs_on_the_device_of_the_run(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objectives gather in it, and nccl moves nothing that lies on the CPU."""
    config = values(tiny_shards, tmp_path, run__weight_ema=True)
    config["objectives"] = [{"name": "clip"}, {"name": "moco", "queue": 12, "hidden": 8, "dim": 4}]
    devices: set[str] = set()

    def spy(learner: Learner, batch: Batch) -> Any:
        tensors = [*learner.parameters(), *learner.buffers(), *batch.images.values(), *batch.texts.values()]
        assert learner.teachers is not None
        tensors += list(learner.teachers.towers_of("ema_0_999_constant").parameters())
        devices.update(tensor.device.type for tensor in tensors)
        raise Reached

    monkeypatch.setattr(setup, "freeze_unused", spy)
    # A device without memory stands for an accelerator: what was left behind would still be on the CPU.
    accelerator: Any = SimpleNamespace(device=torch.device("meta"))
    with pytest.raises(Reached):
        setup.prepare(make_config(config), tmp_path, accelerator)
    assert devices == {"meta"}
