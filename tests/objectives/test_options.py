"""Options that contradict each other are refused before training, and say what to leave out."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import pytest
import torch

from clipkit.objectives import OBJECTIVES
from clipkit.objectives.memory import FeatureQueue
from clipkit.objectives.registry import build_objectives
from clipkit.objectives.suite import FromEntry, embeddings_of, make, specimen
from clipkit.types import ConfigError

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
    ({"name": "distill"}, "no teacher"),
    ({"name": "distill", "stored": {}, "features": -1}, "features"),
]


@pytest.mark.parametrize(("entry", "named"), REFUSED, ids=str)
def test_a_contradiction_is_refused_and_named(entry: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_objectives([entry], OBJECTIVES)
    assert named in str(caught.value)
    assert caught.value.cure


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
