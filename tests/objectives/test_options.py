"""Options that contradict each other are refused before training, and say what to leave out."""

from __future__ import annotations

import copy
import math
from collections import deque
from dataclasses import replace
from typing import Any

import pytest
import torch

from clipkit.models import build
from clipkit.models.teachers import Teachers
from clipkit.objectives import OBJECTIVES, needs_of
from clipkit.objectives.base import Widths, check_batch_size
from clipkit.objectives.memory import FeatureQueue
from clipkit.objectives.registry import build_objectives
from clipkit.objectives.specimens import (
    WIDTHS,
    embeddings_of,
    loss_of,
    make,
    normalised,
    specimen,
)
from clipkit.objectives.suite import FromEntry
from clipkit.train.inputs import build_teachers
from clipkit.types import ConfigError
from tests.conftest import TINY_MODEL
from tests.objectives.entries import ENTRIES

HARD: dict[str, Any] = {"hard_negatives": {"beta": 0.5}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"name": "clip", "label_smoothing": 0.1, **HARD}, "keep one"),
    ({"name": "clip", "label_smoothing": 1.5}, "label_smoothing"),
    ({"name": "clip", "hard_negatives": {"betta": 1}}, "beta"),
    ({"name": "clip", "hard_captions": {"num": 0}}, "hard_captions.num"),
    ({"name": "simclr", "similarity": "dot", **HARD}, "cosine"),
    ({"name": "simclr", "temperature": 0}, "temperature"),
    ({"name": "simclr", "tower": "sound"}, "tower"),
    ({"name": "dcl", "sigma": 0.5, **HARD}, "keep one"),
    ({"name": "infonce", "similarity": "dot", **HARD}, "cosine"),
    ({"name": "infonce", "hard_captions": {}, **HARD}, "hard_captions"),
    ({"name": "infonce", "tower": "image", "hard_captions": {}}, "tower: text"),
    ({"name": "supcon", "label": "cls", "form": "inside"}, "form"),
    ({"name": "pcl", "queue": 30, "clusters": [40]}, "queue"),
    ({"name": "clip", "temperature": 0.005}, "temperature"),
    ({"name": "siglip", "temperature": 0.1, "own_scale": True}, "leave one"),
    ({"name": "distill"}, "no teacher"),
    ({"name": "distill", "stored": {}, "features": -1}, "features"),
    ({"name": "clip", "own_scale": "no"}, "own_scale is 'no'"),
    ({"name": "clip", "hard_negatives": {"detach": "off"}}, "write true or false"),
    ({"name": "infonce", "symmetric": 1}, "write true or false"),
    ({"name": "byol", "simsiam": "no"}, "write true or false"),
    ({"name": "byol", "predictor": "off"}, "write true or false"),
    ({"name": "supcon"}, "write {name: supcon, label: ...}"),
    ({"name": "supcon", "label": 5}, "label is 5"),
    ({"name": "unicl", "label": 5}, "label is 5"),
    ({"name": "triplet", "label": ["a"]}, "label is ['a']"),
    ({"name": "triplet", "tower": ["image"], "label": "cls"}, "tower"),
    ({"name": "triplet", "miner": ["hard"]}, "miner"),
    ({"name": "pcl", "clusters": 256}, "give a list"),
    ({"name": "pcl", "clusters": [3, "5"]}, "clusters is '5'"),
    ({"name": "simclr", "views": 5}, "views is 5"),
    ({"name": "simclr", "views": {"image": "none"}}, "views"),
    ({"name": "simclr", "views": [["none"], "simclr"]}, "views"),
    ({"name": "distill", "teachers": 5}, "teachers is 5"),
    ({"name": "distill", "teachers": [5]}, "teachers is 5"),
    ({"name": "distill", "stored": {"image": 3}}, "stored.image is 3"),
    ({"name": "clip", "views": {"text": ["a"]}}, "views.text"),
    ({"name": "clip", "views": "text"}, "views"),
    ({"name": "clip", "hard_captions": {"num": 1.7}}, "whole number"),
    ({"name": "clip", "hard_captions": {"field": 3}}, "hard_captions.field"),
    ({"name": "clip", "label_smoothing": "0.1"}, "label_smoothing is '0.1'"),
    ({"name": "clip", "targets": {"temperature": 0}}, "targets.temperature"),
    ({"name": "clip", "targets": {"stored": 1}}, "targets.stored"),
    ({"name": "clip", "targets": {}, "label_smoothing": 0.1}, "keep one"),
    ({"name": "infonce", "hard_captions": {"bonus": "x"}}, "give a number"),
    ({"name": "simclr", "temperature": math.inf}, "temperature is inf"),
    ({"name": "clip", "weight": "much"}, "weight is 'much'"),
]


@pytest.mark.parametrize(("entry", "named"), REFUSED, ids=str)
def test_a_contradiction_is_refused_and_named(entry: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_objectives([entry], OBJECTIVES)
    assert named in str(caught.value)
    assert caught.value.cure


def test_dropout_views_of_a_tower_that_drops_nothing_are_refused() -> None:
    widths = Widths({"image": 10, "text": 8}, 6)
    for entry in ({"name": "infonce"}, {"name": "simclr", "tower": "text", "hidden": 12, "dim": 6}):
        with pytest.raises(ConfigError, match="drops nothing") as caught:
            FromEntry(entry)().build(widths)
        assert "hidden_dropout_prob" in caught.value.cure
        assert "views: eda" in caught.value.cure
        FromEntry(entry)().build(replace(widths, stochastic=frozenset({"text"})))
        FromEntry({**entry, "views": "eda"})().build(widths)


def test_a_batch_without_negatives_is_refused_before_training() -> None:
    for entry in ENTRIES.values():
        parts = build_objectives([entry], OBJECTIVES)
        check_batch_size(parts, 2)
        if entry["name"] == "siglip":
            check_batch_size(parts, 1)
            continue
        with pytest.raises(ConfigError, match=r"data\.batch_size is 1") as caught:
            check_batch_size(parts, 1)
        assert "at least 2" in caught.value.cure


def test_averages_that_move_differently_are_kept_apart_and_equal_ones_shared() -> None:
    entries = [{"name": "moco", "hidden": 12, "dim": 6}, {"name": "byol", "hidden": 12, "dim": 6}]
    parts = build_objectives([*entries, {**entries[1], "tower": "text"}], OBJECTIVES)
    needs = needs_of(part for part, _ in parts.values())
    names = [teacher.name for teacher in needs.teachers]
    assert names == ["ema_0_999_constant", "ema_0_996_cosine"]
    assert [len(teacher.views) for teacher in needs.teachers] == [1, 4]
    assert [teacher.momentum_at(1.0) for teacher in needs.teachers] == [0.999, 1.0]
    for part, _ in parts.values():  # there is nothing else that it could read
        part.build(WIDTHS)
        loss_of(part.double(), specimen(part, 0))
    towers = build(copy.deepcopy(TINY_MODEL))
    teachers = Teachers(build_teachers(needs, towers))
    weight = "clip.visual.proj"
    before = towers.get_parameter(weight).detach().clone()
    with torch.no_grad():
        towers.get_parameter(weight).add_(1.0)
    teachers.follow(towers, 0.0)
    for name, momentum in zip(names, (0.999, 0.996), strict=True):
        average = teachers.towers_of(name).get_parameter(weight)
        torch.testing.assert_close(average, before + 1 - momentum)
        assert f"moving.{name}.{weight}" in teachers.state_dict()


def test_graded_targets_equal_the_double_loop() -> None:
    objective = make(FromEntry({"name": "clip", "targets": {"stored": "vector.npy", "temperature": 0.3}}))
    e = embeddings_of(objective, normalised(specimen(objective, 0)), 0.5)
    found = objective(e)
    vectors = [row / row.norm() for row in e.stored["vector.npy"]]
    expected, own = 0.0, 0.0
    for anchors, others in ((e.joint["image"], e.joint["text"]), (e.joint["text"], e.joint["image"])):
        for i, anchor in enumerate(anchors):
            wanted = [math.exp(float(vectors[i] @ vector) / 0.3) for vector in vectors]
            logits = [float(e.logit_scale) * float(anchor @ other) for other in others]
            total = math.log(sum(math.exp(logit) for logit in logits))
            for weight, logit in zip(wanted, logits, strict=True):
                expected += weight / sum(wanted) * (total - logit) / (2 * len(anchors))
            own += wanted[i] / sum(wanted) / (2 * len(anchors))
    assert float(found["loss"]) == pytest.approx(expected, rel=1e-12)
    assert float(found["own_target"]) == pytest.approx(own, rel=1e-12)
    sharp = make(FromEntry({"name": "clip", "targets": {"stored": "vector.npy", "temperature": 1e-3}}))
    plain = make(FromEntry({"name": "clip"}))
    torch.testing.assert_close(sharp(e)["loss"], plain(e)["loss"])


def test_features_of_another_width_name_the_width_that_would_do() -> None:
    objective = make(FromEntry({"name": "distill", "stored": {}, "features": 1.0}))
    leaves = specimen(objective, 0)
    for side in ("image", "text"):
        leaves[f"stored.teacher_{side}.npy"] = torch.randn(12, 9, dtype=torch.float64)
    with pytest.raises(ConfigError, match="width 6 with a teacher's of 9"):
        objective(embeddings_of(objective, leaves, 0.5))


def test_the_age_of_a_queue_is_that_of_its_oldest_row() -> None:
    queue, model = FeatureQueue(10, 2), deque[int](maxlen=10)
    for step in range(8):
        queue.stash(torch.full((4, 2), float(step)))
        state = queue.state()
        assert float(state["queue_filled"]) == pytest.approx(len(model) / 10)
        assert float(state["queue_age"]) == (step - model[0] if model else 0)
        queue.push()
        model.extend([step] * 4)
    assert math.ceil(10 / 4) == 3 == float(state["queue_age"])


def test_equal_captions_are_those_that_the_objective_reads() -> None:
    for views, label in (
        (None, "caption"),
        ({"text": "eda"}, "caption"),
        ({"text": "json.re"}, "caption:json.re"),
    ):
        ((unicl, _),) = build_objectives([{"name": "unicl", "views": views}], OBJECTIVES).values()
        assert unicl.needs.labels == (label,)
