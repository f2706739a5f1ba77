"""Steps whose gradient is not finite under a loss scaler: fp16 needs CUDA, its scaler does not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from clipkit.checkpoint import CheckpointStore
from clipkit.dist import World
from clipkit.export import load
from clipkit.learner import Learner
from clipkit.train import guards, pretrain
from clipkit.train.setup import make_accelerator
from clipkit.types import ClipkitError
from tests.train.runs import columns, values

Scaled = Callable[[float], None]


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Scaled:
    """Makes `pretrain` scale its losses as under fp16, from the given scale on; the arithmetic stays fp32."""

    def start(scale: float) -> None:
        def make(*_: Any) -> Accelerator:
            accelerator = make_accelerator("fp32")
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            accelerator.native_amp = True
            return accelerator

        # By its name it is the function, which hides its module.
        monkeypatch.setattr(sys.modules["clipkit.train.pretrain"], "make_accelerator", make)
        monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")

    return start


def test_a_step_that_overflows_is_counted_and_nothing_else_moves(
    tiny_shards: Path, tmp_path: Path, scaled: Scaled, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled(2.0**124)
    followed: list[int] = []
    after_step = Learner.after_step

    def spy(self: Learner, step: int, progress: float) -> None:
        followed.append(step)
        after_step(self, step, progress)

    monkeypatch.setattr(Learner, "after_step", spy)
    pretrain(values(tiny_shards, tmp_path / "run", run__steps=16))
    assert followed, "no step was taken"
    assert followed == list(range(followed[0], 16)), "the scale falls until the gradient fits, then stays"
    found = CheckpointStore(tmp_path / "run" / "checkpoints", World()).newest()
    assert found is not None
    trainer = found.document("trainer")
    assert trainer["skipped"] == followed[0] > 0
    first = followed[0]
    assert columns(tmp_path / "run")["skipped"] == [*range(1, first), *[first] * (17 - first)]
    assert trainer["scaler"]["scale"] == 2.0 ** (124 - followed[0])
    assert all(bool(x.isfinite().all()) for x in found.tensors("model").values() if x.is_floating_point())


def test_a_run_that_only_overflows_is_stopped(
    tiny_shards: Path, tmp_path: Path, scaled: Scaled, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled(2.0**16)
    monkeypatch.setattr(guards, "MAX_SKIPPED_STEPS_FP16", 6)
    config = values(tiny_shards, tmp_path / "run", optim__lr=1e30, run__checkpoint_every=1)
    config["run"]["diagnose_every"] = 1
    with pytest.raises(
        ClipkitError, match=r"loss.* not finite at step \d+ \(samples \d{6}.*last 6 steps"
    ) as e:
        pretrain(config)
    assert "bf16" in e.value.cure
    assert load(tmp_path / "run").logit_scale > 0
