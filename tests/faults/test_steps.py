"""Steps that must not reach the weights, and numbers that no number of processes may change."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit.dist import World
from clipkit.evaluation.retrieval import retrieval
from clipkit.export import load
from clipkit.learner import Learner
from clipkit.objectives.base import Scale
from clipkit.train import pretrain
from clipkit.types import ClipkitError
from tests.conftest import Ranks
from tests.evaluation.encoders import Projection
from tests.evaluation.test_retrieval import _folder
from tests.objectives.entries import ENTRIES
from tests.train.runs import columns, events, saved, values, weights
from tests.train.test_one_big_batch import check_same, two_steps


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


@pytest.mark.parametrize(
    ("objectives", "gradient", "micro"),
    [(("clip", "simclr", "moco", "byol", "swav, queue"), True, None), (("clip", "simclr"), False, 2)],
)
@pytest.mark.fault(
    "F20",
    "NaN in loss or gradient on one of two ranks, two steps in a row",
    "both ranks skip the same steps; weights, optimizer, queues and averages stay byte for byte; the log "
    "names term, rank and samples",
)
def test_f20_what_is_not_finite_on_one_rank_moves_nothing_on_any(
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


@pytest.mark.fault(
    "F20",
    "more NaN steps in a row than `run.max_skipped_steps`, over a restart",
    "the run stops; what is resumed counts on; no bad checkpoint",
)
def test_f20_too_many_in_a_row_end_the_run_and_a_resumed_run_counts_on(
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


@pytest.mark.fault(
    "F21", "a learning rate of 1e30", "the run stops, naming step and samples; the last checkpoint is finite"
)
def test_f21_a_learning_rate_that_overflows(tiny_shards: Path, tmp_path: Path) -> None:
    config = values(tiny_shards, tmp_path / "run", optim__lr=1e30, run__checkpoint_every=1)
    with pytest.raises(ClipkitError, match=r"not finite at step \d+ \(samples \d{6}"):
        pretrain(config)
    # What was saved before is still a finite model.
    assert load(tmp_path / "run").logit_scale > 0


@pytest.mark.parametrize(
    ("kind", "objective", "micro"), [("patch_dropout", "clip", 6), ("roberta_dropout", "siglip", 3)]
)
@pytest.mark.fault(
    "F31",
    "micro-batches of towers with dropout",
    "gradients and losses of the full graph with the same random numbers, to 1e-10 in fp64",
)
def test_f31_caching_replays_stochastic_layers(run_ranks: Any, kind: str, objective: str, micro: int) -> None:
    (expected,) = run_ranks(1, two_steps, kind, objective, "reference", micro)
    (found,) = run_ranks(1, two_steps, kind, objective, "cached", micro)
    check_same(found, expected)
    (other,) = run_ranks(1, two_steps, kind, objective, "cached", micro, 8)
    assert not torch.equal(other["0.loss"], found["0.loss"]), "nothing stochastic ran"


def _on_rank(rank: int, size: int, folder: Path) -> tuple[dict[str, Any], list[Any]]:
    encoder = Projection(position_noise=0.3)
    result = retrieval(encoder, folder, batch_size=16, world=World(rank, size, rank))
    return result, [encoder.image_shapes, encoder.text_shapes]


@pytest.mark.fault(
    "F32",
    "113 pictures in batches of 16 on 2 and 3 processes",
    "every number as on one; equally many forwards of equal shapes on each",
)
def test_f32_results_are_identical_for_every_number_of_ranks(
    tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    folder = _folder(tmp_path)
    alone, _ = _on_rank(0, 1, folder)
    for size in (2, 3):
        ranks = run_ranks(size, _on_rank, folder)
        assert all(result == alone for result, _ in ranks)
        assert all(shapes == ranks[0][1] for _, shapes in ranks)  # equally many forwards of equal shapes
        assert len(ranks[0][1][0]) == -(-8 // size)  # 113 images are 8 batches of 16


@pytest.mark.fault(
    "F21", "a temperature that starts at 1 / 1,000", "clamped to 1 / 100 with the first step; finite losses"
)
def test_f21_a_scale_of_a_thousand_is_clamped(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Scale(log_scale=math.log(1e3))
    monkeypatch.setattr("clipkit.train.setup.shared_scale", lambda _: start)
    pretrain(values(tiny_shards, tmp_path / "run", run__steps=3))
    found = columns(tmp_path / "run")
    assert max(found["logit_scale"]) <= 100.001
    assert all(math.isfinite(loss) for loss in found["loss"])


@pytest.mark.fault(
    "F31",
    "two objectives at once on 2 processes with micro-batches",
    "losses and gradients of one process with the whole batch, to 1e-10 in fp64",
)
def test_f31_ranks_and_micro_batches_equal_one_batch(run_ranks: Any) -> None:
    (expected,) = run_ranks(1, two_steps, "native", "clip + simclr", "full", 0)
    for found in run_ranks(2, two_steps, "native", "clip + simclr", "cached", 3):
        check_same(found, expected)
