"""Leaps of the loss: what counts as one, and that warning, skipping and rolling back do what they say."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit.config import make_config
from clipkit.learner import Learner
from clipkit.train import pretrain, rollback, spikes
from clipkit.train.loop import Loop
from clipkit.train.spikes import spike_of
from clipkit.types import ClipkitError
from tests.conftest import Ranks
from tests.objectives.entries import ENTRIES
from tests.train.runs import events, saved, trace, values, weights


def test_a_leap_is_seen_and_noise_is_not() -> None:
    draw = random.Random(0)
    losses: list[float] = []
    for step in range(5000):
        # Falling from 7 to 1 with 3 % of noise, as a contrastive loss does; every seventh batch is hard.
        level = 1 + 6 * 0.999**step
        losses.append(draw.gauss(level, 0.03 * level) * (1.1 if step % 7 == 0 else 1.0))
        assert spike_of(losses[-1], losses[-101:-1]) is None
    found = spike_of(2 * losses[-1], losses[-100:])
    assert found is not None
    # Not hidden by a tenth of earlier ones, which the window of a run that only warns contains.
    assert spike_of(2 * losses[-1], [2.5 * x if n % 10 == 0 else x for n, x in enumerate(losses[-100:])])
    # The unit of the loss does not matter, nor does a fall.
    scaled = spike_of(200 * losses[-1], [100 * loss for loss in losses[-100:]])
    assert scaled is not None
    assert scaled.deviations == pytest.approx(found.deviations)
    assert spike_of(-1e9, losses[-100:]) is None


def test_too_few_losses_judge_nothing_and_equal_ones_leave_a_tenth() -> None:
    assert spike_of(1e9, [2.0] * 49) is None
    assert spike_of(2.19, [2.0] * 50) is None
    assert spike_of(2.21, [2.0] * 50) is not None
    assert spike_of(0.1, [0.0] * 50) is not None


def test_off_may_be_written_bare(tiny_shards: Path, tmp_path: Path) -> None:
    # YAML 1.1 reads it as false.
    assert make_config(values(tiny_shards, tmp_path, run__on_spike=False)).run.on_spike == "off"


def spoil(steps: dict[int, float], total: int) -> None:
    """Multiplies the loss of the last rank by the factor of each step (from 0) in forwards that train."""
    score = Learner._score

    def spoiled(self: Learner, *arguments: Any, **named: Any) -> dict[str, torch.Tensor]:
        outputs = score(self, *arguments, **named)
        group = torch.distributed.is_initialized()
        last = not group or torch.distributed.get_rank() + 1 == torch.distributed.get_world_size()
        factor = steps.get(round(total * arguments[2]), 1.0) if last else 1.0
        return {**outputs, "loss": outputs["loss"] * factor}

    Learner._score = spoiled  # type: ignore[method-assign]
    spikes.ENOUGH = 4


def run_spoiled(
    rank: int, world: int, config: dict[str, Any], steps: dict[int, float], dies: tuple[str, int] | None
) -> str:
    """Trains with leaps; dies: (method of Loop, number of the call) that raises, on all ranks."""
    spoil(steps, config["run"]["steps"])
    if dies is not None:
        method, left = dies
        original = getattr(Loop, method)

        def count(self: Loop, *arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise InterruptedError
            return original(self, *arguments, **named)

        setattr(Loop, method, count)
    try:
        pretrain(config)
    except InterruptedError:
        return "died"
    except ClipkitError as error:
        return error.cause
    return ""


def test_warning_changes_nothing_and_skipping_holds_the_weights(tiny_shards: Path, tmp_path: Path) -> None:
    leaps = {7: 60.0, 8: 60.0}
    for mode, every, world in (("off", 20, 1), ("warn", 20, 1), ("skip", 1, 2)):
        config = values(
            tiny_shards, tmp_path / mode, run__steps=10, run__on_spike=mode, run__checkpoint_every=every
        )
        config["run"]["keep_checkpoints"] = 20
        assert Ranks(world, run_spoiled, config, leaps, None).values() == [""] * world
    assert trace(tmp_path / "off") == trace(tmp_path / "warn")
    assert weights(tmp_path / "off") == weights(tmp_path / "warn")
    assert [record["step"] for record in events(tmp_path / "warn", "spike")] == [8, 9]
    found = events(tmp_path / "skip", "skipped")
    assert [record["step"] for record in found] == [8, 9]
    assert sorted(found[0]["keys"]) == ["0", "1"]
    for step in range(7, 11):
        same = saved(tmp_path / "skip", step) == saved(tmp_path / "skip", step - 1)
        assert same == (step in (8, 9)), step


def test_the_window_is_resumed_and_a_new_level_ends_a_run_that_skips(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In this process, where a patch of the class would stay.
    monkeypatch.setattr(Learner, "_score", Learner._score)
    monkeypatch.setattr(spikes, "ENOUGH", spikes.ENOUGH)
    causes = []
    for name, first in (("straight", 3), ("broken", 1)):
        config = values(
            tiny_shards, tmp_path / name, run__steps=16, run__on_spike="skip", run__max_skipped_steps=3
        )
        for most in sorted({first, 3}):
            config["run"]["max_skipped_steps"] = most
            with monkeypatch.context() as patched:
                patched.setattr(Learner, "_score", Learner._score)
                causes.append(run_spoiled(0, 1, config, dict.fromkeys(range(9, 16), 60.0), None))
    assert causes[0] == causes[2]
    assert "at step 12 " in causes[0]
    assert "last 3 steps" in causes[0]
    assert events(tmp_path / "straight", "skipped") == events(tmp_path / "broken", "skipped")
    assert trace(tmp_path / "straight") == trace(tmp_path / "broken")


def rolling(shards: Path, folder: Path) -> dict[str, Any]:
    config = values(shards, folder, run__steps=14, run__on_spike="rollback", run__checkpoint_every=5)
    config["objectives"] = [ENTRIES[name] for name in ("clip", "simclr")]
    return config


def test_a_rollback_passes_over_the_batches_wherever_the_run_is_killed(
    tiny_shards: Path, tmp_path: Path
) -> None:
    leaps = {7: 60.0, 11: 60.0}
    straight, broken, plain = (rolling(tiny_shards, tmp_path / name) for name in ("one", "two", "three"))
    assert Ranks(2, run_spoiled, straight, leaps, None).values() == ["", ""]
    found = events(tmp_path / "one", "rollback")
    assert [(record["to"], record["passed"]) for record in found] == [(5, [6, 8]), (10, [11, 12])]
    assert sorted(trace(tmp_path / "one")) == [1, 2, 3, 4, 5, 9, 10, 13, 14]
    # Before the positions are on disk (save 0 is the first, 1 of step 5, 2 of the rollback), and after.
    for dies, outcome in ((("_save", 2), "died"), (("_pass_over", 1), "died"), (None, "")):
        assert Ranks(2, run_spoiled, broken, leaps, dies).values() == [outcome] * 2
    assert trace(tmp_path / "two") == trace(tmp_path / "one")
    assert weights(tmp_path / "two") == weights(tmp_path / "one")
    assert events(tmp_path / "two", "rollback") == found
    # A run that has never seen those batches, and never a leap.
    plain["run"]["on_spike"] = "off"
    assert Ranks(2, run_without, plain, {5, 6, 7, 10, 11}).values() == ["", ""]
    assert trace(tmp_path / "three") == trace(tmp_path / "one")
    assert weights(tmp_path / "three") == weights(tmp_path / "one")


def run_without(rank: int, world: int, config: dict[str, Any], left_out: set[int]) -> str:
    """Trains as if the steps `left_out` (from 0) were not in the calendar."""
    advance = Loop._train

    def train(self: Loop, continue_rng: Any) -> Any:
        self.state.passed = sorted(left_out)
        return advance(self, continue_rng)

    Loop._train = train  # type: ignore[method-assign]
    return run_spoiled(rank, world, config, {}, None)


def test_rollbacks_are_counted_and_bounded(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Learner, "_score", Learner._score)
    monkeypatch.setattr(spikes, "ENOUGH", spikes.ENOUGH)
    monkeypatch.setattr(rollback, "MAX_ROLLBACKS", 1)
    config = values(tiny_shards, tmp_path / "run", run__steps=14, run__on_spike="rollback")
    cause = run_spoiled(0, 1, config, {7: 60.0, 11: 60.0}, None)
    assert "at step 12, after 1 rollbacks" in cause
