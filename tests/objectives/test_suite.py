"""Every objective of the registry passes the generic suite, and the suite catches those that should not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clipkit import dist
from clipkit.losses import clip_loss
from clipkit.objectives import OBJECTIVES, Objective, suite
from clipkit.types import IMAGE, TEXT, Embeddings, Needs
from tests.objectives.entries import ENTRIES


def maker(label: str) -> suite.FromEntry:
    return suite.FromEntry(ENTRIES[label])


def test_every_objective_has_an_entry() -> None:
    assert {entry["name"] for entry in ENTRIES.values()} == set(OBJECTIVES)


@pytest.mark.parametrize("label", ENTRIES)
@pytest.mark.parametrize(
    "check", [suite.check_value, suite.check_gradient, suite.check_permutation, suite.check_state]
)
def test_one_process(label: str, check: Any) -> None:
    finding = check(maker(label))
    assert finding.holds, finding.detail


@pytest.mark.parametrize("label", ENTRIES)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one_process(run_ranks: Any, label: str, world: int) -> None:
    finding = suite.check_ranks(maker(label), world, run_ranks)
    assert finding.holds, finding.detail


class Broken(Objective):
    """A contrastive loss with one mistake, chosen by name."""

    needs = Needs(views=(IMAGE, TEXT))

    def __init__(self, mistake: str) -> None:
        super().__init__()
        self.mistake = mistake
        self.seen = 0

    def forward(self, e: Embeddings) -> Tensor:
        image, text = e.joint["image"], e.joint["text"]
        rank = dist.World.current().rank
        if self.mistake == "local negatives":
            return clip_loss(image, text, e.logit_scale)
        if self.mistake == "gather without gradient":
            others = [dist.gather(x).detach() for x in (image, text)]
            own = slice(rank * len(image), (rank + 1) * len(image))
            for rows, x in zip(others, (image, text), strict=True):
                rows[own] = x
            return clip_loss(image, text, e.logit_scale, rank, lambda x: others[0 if x is image else 1])
        if self.mistake == "sum":
            return len(image) * clip_loss(image, text, e.logit_scale, rank, dist.gather)
        if self.mistake == "order":
            weights = torch.arange(len(image), dtype=image.dtype)
            return (weights * (image * text).sum(1)).mean()
        if self.mistake == "half gradient":
            mixed = (image + image.detach()) / 2
            return clip_loss(mixed, text, e.logit_scale, rank, dist.gather)
        self.seen += 1
        return self.seen * clip_loss(image, text, e.logit_scale, rank, dist.gather)

    def after_step(self) -> None:
        self.seen += 1


class Make:
    def __init__(self, mistake: str) -> None:
        self.mistake = mistake

    def __call__(self) -> Objective:
        return Broken(self.mistake)


@pytest.mark.parametrize("mistake", ["local negatives", "gather without gradient", "sum"])
def test_the_suite_sees_what_depends_on_ranks(run_ranks: Any, mistake: str) -> None:
    assert not suite.check_ranks(Make(mistake), 2, run_ranks).holds


def test_the_suite_sees_order_gradient_and_state() -> None:
    assert not suite.check_permutation(Make("order")).holds
    assert not suite.check_gradient(Make("half gradient")).holds
    assert not suite.check_state(Make("a counter outside the state")).holds


def test_the_suite_sees_what_is_read_without_being_declared() -> None:
    class Undeclared(Objective):
        needs = Needs(views=(IMAGE,))

        def forward(self, e: Embeddings) -> Tensor:
            return (e.joint["image"] * e.joint["text"]).sum()

    with pytest.raises(KeyError):
        suite.check_value(Undeclared)
