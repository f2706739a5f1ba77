"""Margin losses: pairs and triplets."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.losses.contrastive import same_label
from clipkit.losses.margin import (
    Distance,
    Miner,
    distances,
    mined_triplets,
    pair_margin_loss,
    row_distances,
    triplet_loss,
)
from tests.losses.inputs import pairs, unit_rows
from tests.oracles import mean, rows_of, slow_pair_margin, slow_triplets, squared_gap

KINDS: tuple[Distance, ...] = ("squared_euclidean", "euclidean", "cosine")
MINERS: tuple[Miner, ...] = ("all", "semi_hard", "hard")
LABELS = torch.tensor([4, 1, 4, -1, 4, 1, -1, 6])


def slow_distance(x: list[float], y: list[float], kind: Distance) -> float:
    if kind == "cosine":
        lengths = math.sqrt(sum(p * p for p in x) * sum(q * q for q in y))
        return 1 - sum(p * q for p, q in zip(x, y, strict=True)) / lengths
    return squared_gap(x, y) ** (0.5 if kind == "euclidean" else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_distances_are_what_their_names_say(kind: Distance) -> None:
    a, b = 2 * unit_rows(4, seed=1), unit_rows(4, seed=2) + 0.3
    matrix, rows = distances(a, b, kind), row_distances(a, b, kind)
    for i, x in enumerate(rows_of(a)):
        for j, y in enumerate(rows_of(b)):
            assert float(matrix[i, j]) == pytest.approx(slow_distance(x, y, kind), rel=1e-12)
    torch.testing.assert_close(rows, matrix.diagonal())


@pytest.mark.parametrize("function", [distances, row_distances])
def test_unknown_distances_are_refused(function) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="squared_euclidean, euclidean, cosine"):
        function(unit_rows(), unit_rows(), "manhattan")


def test_the_pair_margin_equals_the_loop() -> None:
    a, b = pairs(6)
    similar = torch.tensor([True, False, False, True, False, False])
    found = pair_margin_loss(row_distances(a, b), similar, 1.4)
    assert float(found) == pytest.approx(slow_pair_margin(a, b, similar.tolist(), 1.4), rel=1e-13)
    # The paper's formula with the paper's label, which is 1 for DISSIMILAR pairs.
    y, d = (~similar).double(), row_distances(a, b)
    paper = (1 - y) * d**2 / 2 + y * (1.4 - d).clamp_min(0) ** 2 / 2
    torch.testing.assert_close(found, paper.mean())


def test_similar_pairs_are_pulled_and_dissimilar_ones_pushed_up_to_the_margin() -> None:
    a = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    for similar, gap, cost, pull in (
        (True, 0.5, 0.125, 0.5),
        (False, 0.5, 0.125, -0.5),
        (False, 1.5, 0.0, 0.0),
    ):
        b = torch.tensor([[gap, 0.0]], dtype=torch.float64, requires_grad=True)
        found = pair_margin_loss(row_distances(a, b), torch.tensor([similar]))
        assert found.item() == pytest.approx(cost)
        assert torch.autograd.grad(found, b)[0].tolist() == [[pytest.approx(pull), 0.0]]


@pytest.mark.parametrize("similar", [True, False])
def test_equal_rows_of_a_pair_get_a_finite_gradient(similar: bool) -> None:
    a = unit_rows(3).requires_grad_()
    found = pair_margin_loss(row_distances(a, a.detach().clone()), torch.full((3,), similar))
    assert found.item() == (0.0 if similar else 0.5)
    assert not torch.autograd.grad(found, a)[0].any()


def test_pairs_can_be_left_out_or_balanced() -> None:
    distance = torch.tensor([[0.2, 0.4], [0.6, 3.0]], dtype=torch.float64)
    similar = torch.tensor([[True, False], [False, True]])
    keep = torch.tensor([[True, True], [True, False]])
    pull, push = 0.2**2 / 2, [(1 - 0.4) ** 2 / 2, (1 - 0.6) ** 2 / 2]
    assert float(pair_margin_loss(distance, similar, keep=keep)) == pytest.approx(mean([pull, *push]))
    assert float(pair_margin_loss(distance, similar, keep=keep, balanced=True)) == pytest.approx(
        pull + mean(push)
    )
    assert float(pair_margin_loss(distance, similar, keep=keep & similar & ~keep)) == 0


@pytest.mark.parametrize("average", ["all", "nonzero"])
@pytest.mark.parametrize("margin", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("miner", MINERS)
def test_triplets_equal_the_loop(miner: Miner, kind: Distance, margin: float, average: str) -> None:
    a, b = pairs(8)
    for views in ((a, b), (a, None)):
        positive = same_label(LABELS)
        negative = ~positive
        other = views[1]
        directions = [(a, a)] if other is None else [(a, other), (other, a)]
        if other is None:
            positive = positive & ~torch.eye(8, dtype=torch.bool)
        expected = []
        for x, y in directions:
            matrix = [[slow_distance(p, q, kind) for q in rows_of(y)] for p in rows_of(x)]
            costs = slow_triplets(matrix, positive.tolist(), negative.tolist(), margin, miner)
            expected.append(
                mean(costs if average == "all" else [cost for cost in costs if cost > 0] or [0.0])
            )
        found = triplet_loss(
            a,
            other,
            LABELS,
            margin,
            miner=miner,
            distance=kind,
            average=average,  # type: ignore[arg-type]
        )
        assert float(found) == pytest.approx(mean(expected), rel=1e-11)


def test_all_pairs_is_the_sum_of_hinges_and_hard_its_maximum() -> None:
    a, b = pairs(6)
    similarity = a @ b.T
    hinge = (0.2 + similarity - similarity.diagonal()[:, None]).clamp_min(0)
    mirror = (0.2 + similarity - similarity.diagonal()[None, :]).clamp_min(0)
    off = ~torch.eye(6, dtype=torch.bool)
    total = (hinge[off].sum() + mirror[off].sum()) / (2 * 6 * 5)
    hardest = (hinge * off).amax(1).mean() / 2 + (mirror * off).amax(0).mean() / 2
    torch.testing.assert_close(triplet_loss(a, b, miner="all", distance="cosine"), total)
    torch.testing.assert_close(triplet_loss(a, b, miner="hard", distance="cosine"), hardest)


def test_torch_agrees_on_triplets_of_one_positive_and_one_negative() -> None:
    a, b = pairs(2)
    expected = F.triplet_margin_with_distance_loss(
        torch.cat([a, b]),
        torch.cat([b, a]),
        torch.cat([b.flip(0), a.flip(0)]),
        distance_function=lambda x, y: (x - y).square().sum(1),
        margin=0.7,
    )
    for miner in MINERS:
        torch.testing.assert_close(triplet_loss(a, b, margin=0.7, miner=miner), expected)


def mined(distance: Tensor, miner: Miner, margin: float = 1.0) -> Tensor:
    """Which negatives of one anchor with its positive at column 0 are chosen: those with a gradient."""
    distance = distance[None].clone().requires_grad_()
    positive = torch.zeros_like(distance, dtype=torch.bool)
    positive[0, 0] = True
    loss = mined_triplets(distance, positive, ~positive, margin, miner)
    return torch.autograd.grad(loss, distance)[0][0, 1:] < 0


def test_semi_hard_negatives_are_the_nearest_beyond_the_positive() -> None:
    distance = torch.tensor([2.0, 0.5, 1.9, 2.4, 2.9, 3.5])
    assert mined(distance, "semi_hard").tolist() == [False, False, True, False, False]
    assert mined(distance, "hard").tolist() == [True, False, False, False, False]
    assert mined(distance, "all").tolist() == [True, True, True, True, False]


def test_at_equal_distance_a_negative_is_not_semi_hard() -> None:
    assert mined(torch.tensor([2.0, 2.0, 2.5]), "semi_hard").tolist() == [False, True]


def test_without_a_negative_beyond_the_positive_the_farthest_is_taken() -> None:
    assert mined(torch.tensor([2.0, 0.5, 1.5, 1.0]), "semi_hard").tolist() == [False, True, False]


def test_a_negative_exactly_at_the_margin_is_none_of_the_nonzero() -> None:
    distance = torch.tensor([[1.0, 2.0, 1.5]])
    positive = torch.tensor([[True, False, False]])
    for average, expected in (("all", 0.25), ("nonzero", 0.5)):
        found = mined_triplets(distance, positive, ~positive, 1.0, "all", average)  # type: ignore[arg-type]
        assert float(found) == expected


@pytest.mark.parametrize("seed", range(10))
def test_harder_mining_never_costs_an_anchor_less(seed: int) -> None:
    distance = unit_rows(1, 12, seed).abs() * 3
    positive = torch.zeros_like(distance, dtype=torch.bool)
    positive[0, :4] = True
    costs = {m: float(mined_triplets(distance, positive, ~positive, 0.3, m)) for m in MINERS}
    assert costs["all"] <= costs["hard"] + 1e-12
    assert costs["semi_hard"] <= costs["hard"] + 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("miner", MINERS)
def test_a_collapsed_embedding_costs_exactly_the_margin(miner: Miner, kind: Distance) -> None:
    same = torch.full((8, 4), 0.5, dtype=torch.float64, requires_grad=True)
    found = triplet_loss(same, None, LABELS, 0.2, miner=miner, distance=kind)
    assert found.item() == pytest.approx(0.2, abs=1e-15)
    assert torch.isfinite(torch.autograd.grad(found, same)[0]).all()


@pytest.mark.parametrize("average", ["all", "nonzero"])
@pytest.mark.parametrize("miner", MINERS)
def test_classes_beyond_the_margin_cost_nothing(miner: Miner, average: str) -> None:
    rows = torch.eye(3, dtype=torch.float64).repeat_interleave(2, 0).requires_grad_()
    labels = torch.arange(3).repeat_interleave(2)
    found = triplet_loss(rows, None, labels, 1.9, miner=miner, average=average)  # type: ignore[arg-type]
    assert found.item() == 0
    assert not torch.autograd.grad(found, rows)[0].any()


@pytest.mark.parametrize("miner", MINERS)
def test_anchors_without_a_positive_or_a_negative_are_left_out(miner: Miner) -> None:
    rows = unit_rows(4).requires_grad_()
    for labels in (torch.arange(4), torch.zeros(4, dtype=torch.int64)):
        found = triplet_loss(rows, None, labels, miner=miner)
        assert found.item() == 0
        assert not torch.autograd.grad(found, rows)[0].any()


@pytest.mark.parametrize("kind", ["squared_euclidean", "euclidean"])
def test_a_shift_does_not_matter(kind: Distance) -> None:
    a, b = pairs(8)
    shift = torch.arange(5, dtype=torch.float64)
    found = triplet_loss(a + shift, b + shift, LABELS, distance=kind)
    torch.testing.assert_close(found, triplet_loss(a, b, LABELS, distance=kind))


def test_what_cannot_be_meant_is_refused() -> None:
    a, b = pairs(4)
    with pytest.raises(ValueError, match="pass labels or a second view"):
        triplet_loss(a, None)
    with pytest.raises(ValueError, match="all, semi_hard, hard"):
        triplet_loss(a, b, miner="easy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="all, nonzero"):
        triplet_loss(a, b, average="some")  # type: ignore[arg-type]
