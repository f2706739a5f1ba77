"""Every objective of the registry passes the generic suite, and the suite catches those that should not."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch
from torch import Tensor

from clipkit import dist
from clipkit.losses import clip_loss
from clipkit.objectives import OBJECTIVES, Objective, suite
from clipkit.objectives.specimens import (
    STEPS,
    embeddings_of,
    loss_of,
    make,
    normalised,
    specimen,
    warmed,
)
from clipkit.types import IMAGE, TEXT, ConfigError, Embeddings, Needs
from tests.objectives.entries import ENTRIES


def maker(label: str) -> suite.FromEntry:
    return suite.FromEntry(ENTRIES[label])


def test_every_objective_has_an_entry() -> None:
    assert {entry["name"] for entry in ENTRIES.values()} == set(OBJECTIVES)


@pytest.mark.parametrize("label", ENTRIES)
@pytest.mark.parametrize("check", suite.CHECKS)
def test_one_process(label: str, check: Any) -> None:
    finding = check(maker(label))
    assert finding.holds, finding.detail


@pytest.mark.parametrize("label", ENTRIES)
@pytest.mark.parametrize("shares", [(), suite.UNEVEN])
def test_ranks_equal_one_process(run_ranks: Any, label: str, shares: tuple[int, ...]) -> None:
    finding = suite.check_ranks(maker(label), len(shares) or 2, run_ranks, shares)
    assert finding.holds, finding.detail


@pytest.mark.parametrize(
    ("label", "term"), [("moco", "queue_filled"), ("pcl", "prototypes"), ("swav, queue", "queue_filled")]
)
def test_the_suite_looks_at_objectives_whose_state_is_full(label: str, term: str) -> None:
    objective = warmed(maker(label))
    terms = objective(embeddings_of(objective, normalised(specimen(objective, STEPS)), 0.5))
    assert float(terms[term].detach()) >= 1
    fresh = make(maker(label))
    assert not torch.equal(loss_of(fresh, specimen(objective, STEPS)), terms["loss"])


def test_fresh_processes_answer_as_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = suite.steps(0, 1, maker("clip"))
    for found in suite.spawn(2, suite.steps, maker("clip")):
        error, where = suite.difference(found, expected)
        assert error < suite.TOLERANCE, where
    # How a failure is reported does not depend on how the process was started; a fresh one costs 5 s.
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr("clipkit.objectives.suite.multiprocessing.get_context", lambda _: fork)
    with pytest.raises(ConfigError, match="a rank failed: ValueError: no such luck"):
        suite.spawn(1, suite.steps, Raising)


class Doubled(torch.autograd.Function):
    """The identity with twice its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


class Broken(Objective):
    """A contrastive loss with one mistake, chosen by name."""

    needs = Needs(views=(IMAGE, TEXT))

    def __init__(self, mistake: str) -> None:
        super().__init__()
        self.mistake = mistake
        self.seen = 0
        self.stops_gradient = mistake.startswith("stopped")

    def forward(self, e: Embeddings) -> Tensor:
        image, text = e.joint["image"], e.joint["text"]
        first = dist.first_row(image)
        if self.mistake == "local negatives":
            return clip_loss(image, text, e.logit_scale)
        if self.mistake == "gather without gradient":
            others = [dist.gather(x).detach() for x in (image, text)]
            own = slice(first, first + len(image))
            for rows, x in zip(others, (image, text), strict=True):
                rows[own] = x
            return clip_loss(image, text, e.logit_scale, first, lambda x: others[0 if x is image else 1])
        if self.mistake == "sum":
            return len(image) * clip_loss(image, text, e.logit_scale, first, dist.gather)
        if self.mistake == "order":
            weights = torch.arange(len(image), dtype=image.dtype)
            return (weights * (image * text).sum(1)).mean()
        if self.mistake == "half gradient":
            mixed = (image + image.detach()) / 2
            return clip_loss(mixed, text, e.logit_scale, first, dist.gather)
        if self.mistake.startswith("stopped"):
            with torch.no_grad():
                weights = (image * text).sum(1).exp()
            straight = image + (image.sign() - image).detach()
            pull = (weights * (straight * text).sum(1)).mean()
            return clip_loss(image, text, e.logit_scale) - (
                Doubled.apply(pull) if self.mistake == "stopped and doubled" else pull
            )
        if self.mistake == "indifferent":
            return clip_loss(image, text, e.logit_scale, first, dist.gather) * 0
        if self.mistake == "constant":
            return clip_loss(image.detach(), text.detach(), e.logit_scale, first, dist.gather)
        if self.mistake == "in place":
            return clip_loss(image.mul_(1), text, e.logit_scale, first, dist.gather)
        if self.mistake == "through the projection":
            (slope,) = torch.autograd.grad(
                image.sum(), e.trunk["image"], create_graph=True, allow_unused=True
            )
            loss = clip_loss(image, text, e.logit_scale, first, dist.gather)
            return loss if slope is None else loss + slope.square().mean()
        self.seen += 1
        return self.seen * clip_loss(image, text, e.logit_scale, first, dist.gather)

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


def test_the_suite_sees_a_loss_that_nothing_moves() -> None:
    for mistake in ("indifferent", "constant"):
        for check in (suite.check_gradient, suite.check_permutation):
            finding = check(Make(mistake))
            assert not finding.holds
            assert "no gradient" in finding.detail


def test_what_is_detached_is_held_and_the_rest_is_still_compared() -> None:
    assert suite.check_gradient(Make("stopped")).holds
    assert not suite.check_gradient(Make("stopped and doubled")).holds
    for label in ("simsiam", "swav", "dcl, weighted"):

        def unaware(label: str = label) -> Objective:
            objective = maker(label)()
            objective.stops_gradient = False
            return objective

        assert not suite.check_gradient(unaware).holds, label


@pytest.mark.parametrize("mistake", ["a counter outside the state", "in place", "through the projection"])
def test_the_suite_sees_what_micro_batches_would_change(mistake: str) -> None:
    assert not suite.check_caching(Make(mistake)).holds
    assert suite.check_caching(Make("local negatives")).holds


def test_the_suite_reports_what_an_objective_raises(run_ranks: Any) -> None:
    findings = suite.check_all(lambda: Raising(), run_ranks)
    assert len(findings) == len(suite.CHECKS) + 2
    for finding in findings:
        assert not finding.holds
        assert "ValueError: no such luck (test_suite.py, line" in finding.detail


class Raising(Objective):
    needs = Needs(views=(IMAGE,))

    def forward(self, e: Embeddings) -> Tensor:
        raise ValueError("no such luck")


def test_the_suite_sees_what_is_read_without_being_declared() -> None:
    class Undeclared(Objective):
        needs = Needs(views=(IMAGE,))

        def forward(self, e: Embeddings) -> Tensor:
            return (e.joint["image"] * e.joint["text"]).sum()

    with pytest.raises(KeyError):
        suite.check_value(Undeclared)
    finding = suite.guarded(suite.check_value, Undeclared)
    assert not finding.holds
    assert finding.detail.startswith("KeyError: 'text' (test_suite.py")
