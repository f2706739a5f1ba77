"""Steps that must not reach the weights: what is not finite on one rank is skipped on all of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit.learner import Learner
from clipkit.train import pretrain
from clipkit.types import ClipkitError
from tests.conftest import Ranks
from tests.objectives.entries import ENTRIES
from tests.train.runs import columns, values, weights


def spoil(rank: int, steps: tuple[int, ...], factor: float, gradient: bool) -> None:
    """Makes `rank` find its loss times `factor` in these steps; gradient: and the gradient too."""
    score, calls = Learner._score, 0

    def spoiled(self: Learner, *arguments: Any, **named: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        outputs = score(self, *arguments, **named)
        # The first forward is the trial of the setup, so call k + 1 is step k.
        if calls - 1 in steps and rank == torch.distributed.get_rank():
            loss = outputs["loss"]
            outputs["loss"] = loss * factor if gradient else loss + (loss * factor - loss).detach()
            outputs["loss/clip"] = outputs["loss/clip"] * factor
        return outputs

    Learner._score = spoiled  # type: ignore[method-assign]


def train_spoiled(rank: int, world: int, config: dict[str, Any], *how: Any) -> str:
    spoil(*how)
    try:
        pretrain(config)
    except ClipkitError as error:
        return error.cause
    return ""


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record.get("event") == kind]


def saved(folder: Path, step: int) -> dict[str, bytes]:
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    return {name: (checkpoint / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")}


@pytest.mark.parametrize(
    ("objectives", "gradient", "micro"),
    [(("clip", "simclr", "moco", "byol", "swav, queue"), True, None), (("clip", "simclr"), False, 2)],
)
def test_what_is_not_finite_on_one_rank_moves_nothing_on_any(
    tiny_shards: Path, tmp_path: Path, objectives: tuple[str, ...], gradient: bool, micro: int | None
) -> None:
    # A checkpoint after every step, byte for byte: weights, averages, queues, BatchNorm, optimizer.
    config = values(
        tiny_shards, tmp_path / "run", run__steps=6, run__checkpoint_every=1, run__keep_checkpoints=9
    )
    config["objectives"] = [ENTRIES[name] for name in objectives]
    config["data"]["micro_batch"] = micro
    causes = Ranks(2, train_spoiled, config, 1, (3, 4), math.nan, gradient).values()
    assert causes == ["", ""]
    moved = [saved(tmp_path / "run", step) != saved(tmp_path / "run", step - 1) for step in range(2, 7)]
    assert moved == [True, False, False, True, True]
    assert all(
        saved(tmp_path / "run", step)[part] != saved(tmp_path / "run", step - 1)[part]
        for step in (2, 5)
        for part in ("model", "optimizer")
    )
    found = events(tmp_path / "run", "skipped")
    assert [(record["step"], record["in_a_row"]) for record in found] == [(3, 1), (4, 2)]
    for record in found:
        assert record["terms"] == ["loss/clip"]
        assert list(record["keys"]) == ["1"], "the rank on which it happened"
        assert all(len(key) == 6 for key in record["keys"]["1"])
        assert record["keys"]["1"][0] in record["cause"]
    logged = columns(tmp_path / "run")
    assert [value is None for value in logged["loss"]] == [False, False, True, True, False, False]
    assert logged["skipped"] == [1, 2, 2, 2]
    # The schedule is a function of the step and goes on.
    assert logged["lr"][1:] == sorted(set(logged["lr"]), reverse=True)


def test_too_many_in_a_row_end_the_run_and_a_resumed_run_counts_on(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = Learner._score

    def spoiled(self: Learner, *arguments: Any, **named: Any) -> dict[str, torch.Tensor]:
        outputs = score(self, *arguments, **named)
        bad = round(24 * arguments[2]) in (1, 3, 4, 5, 6)
        return {**outputs, "loss": outputs["loss"] * (math.nan if bad else 1.0)}

    monkeypatch.setattr(Learner, "_score", spoiled)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    causes = []
    # The checkpoint of step 5 lies between the second and the third skipped step in a row.
    for folder, most in ((straight, 4), (broken, 3), (broken, 4)):
        with pytest.raises(ClipkitError, match=rf"last {most} steps") as caught:
            pretrain(values(tiny_shards, folder, run__max_skipped_steps=most))
        causes.append(caught.value.cause)
    assert causes[0] == causes[2]
    assert "at step 7 " in causes[0]
    assert "at step 6 " in causes[1]
    assert events(straight, "skipped") == events(broken, "skipped")
    # Over the skipped steps and beyond: the same weights as without the interruption.
    for folder in (straight, broken):
        pretrain(values(tiny_shards, folder, run__max_skipped_steps=5))
    assert weights(straight) == weights(broken)
    assert columns(straight)["loss"] == columns(broken)["loss"]
    assert columns(straight)["skipped"][-1] == 5
