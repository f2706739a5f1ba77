"""Prototypes: Sinkhorn codes, swapped prediction, and clusters."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.losses.contrastive import contrastive_loss
from clipkit.losses.prototypes import concentrations, proto_nce_loss, sinkhorn, swav_loss
from tests.losses.inputs import over_ranks, unit_rows
from tests.oracles import rows_of, slow_proto_nce, slow_sinkhorn, slow_swav, squared_gap


def crops(count: int = 4, rows: int = 10, prototypes: int = 6) -> list[Tensor]:
    centres = unit_rows(prototypes, 5, 99)
    return [unit_rows(rows, 5, seed) @ centres.T for seed in range(count)]


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_codes_equal_those_of_the_exponential_domain(iterations: int) -> None:
    scores = crops()[0]
    found = sinkhorn(scores, 0.1, iterations)
    expected = torch.tensor(slow_sinkhorn(scores, 0.1, iterations), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-300)


def test_rows_sum_to_one_and_columns_tend_to_equal_shares() -> None:
    scores = crops(rows=16, prototypes=20)[0]
    spreads = []
    for iterations in (3, 30, 300):
        codes = sinkhorn(scores, 0.05, iterations)
        torch.testing.assert_close(codes.sum(1), torch.ones(16, dtype=torch.float64))
        spreads.append(float((codes.sum(0) - 16 / 20).std()))
    assert spreads[0] > spreads[1] > spreads[2]
    assert spreads[2] < 1e-6


def test_scores_without_preference_give_codes_without_preference() -> None:
    codes = sinkhorn(torch.full((4, 6), 0.3), 0.05)
    torch.testing.assert_close(codes, torch.full((4, 6), 1 / 6))


def test_codes_survive_an_entropy_that_exponentials_do_not() -> None:
    scores = crops()[0].float()
    assert torch.exp(scores / 0.005).isinf().any()
    codes = sinkhorn(scores, 0.005)
    torch.testing.assert_close(codes.double(), sinkhorn(scores.double(), 0.005), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("world", [2, 5])
def test_codes_of_split_rows_are_those_of_the_batch(world: int) -> None:
    scores = crops()[0]
    weights = torch.arange(60, dtype=torch.float64).view(10, 6).sin()
    expected = (sinkhorn(scores) * weights).sum() / world
    rows = {"scores": scores, "weights": weights}
    found = over_ranks(
        world, rows, lambda r, first, g, m: (sinkhorn(r["scores"], reduce=m) * r["weights"]).sum()
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize(("count", "assigned"), [(2, (0, 1)), (4, (0, 1)), (3, (2,)), (3, (0, 1, 2))])
def test_swapped_prediction_equals_the_loop(count: int, assigned: tuple[int, ...]) -> None:
    scores = crops(count)
    expected = slow_swav(scores, assigned, 0.2, 0.1, 3)
    found = swav_loss(scores, assigned=assigned, temperature=0.2, epsilon=0.1)
    assert float(found) == pytest.approx(expected, rel=1e-11)


def test_small_crops_give_no_codes_and_codes_get_no_gradient() -> None:
    scores = [x.requires_grad_() for x in crops(3)]
    codes = [sinkhorn(scores[0]), sinkhorn(scores[1])]
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2)]
    expected = torch.stack([contrastive_loss(scores[v] / 0.1, codes[c]) for c, v in pairs]).mean()
    found = swav_loss(scores)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, scores), torch.autograd.grad(expected, scores))


def test_queued_scores_steady_the_codes_and_are_not_predicted() -> None:
    scores, queued = crops(2), crops(4, 7)[2:]
    codes = [sinkhorn(torch.cat([s, q]))[:10] for s, q in zip(scores, queued, strict=True)]
    expected = (contrastive_loss(scores[1] / 0.1, codes[0]) + contrastive_loss(scores[0] / 0.1, codes[1])) / 2
    torch.testing.assert_close(swav_loss(scores, extra=queued), expected)
    empty = [x[:0] for x in queued]
    torch.testing.assert_close(swav_loss(scores, extra=empty), swav_loss(scores))


def test_prototypes_have_no_order() -> None:
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(swav_loss([x[:, order] for x in crops()]), swav_loss(crops()))


def test_one_crop_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two crops"):
        swav_loss(crops(1))


def clusters() -> tuple[Tensor, Tensor, Tensor]:
    """Members, prototypes and assignment; cluster 3 has one member and cluster 4 none."""
    assignment = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 0, 1])
    return unit_rows(12), unit_rows(5, seed=1), assignment


def test_the_concentration_is_that_of_the_paper_before_clipping() -> None:
    members, prototypes, assignment = clusters()
    found = concentrations(members, prototypes, assignment, 0.2)
    spread = {}
    for number in range(5):
        own = [row for row, n in zip(rows_of(members), assignment.tolist(), strict=True) if n == number]
        if len(own) > 1:
            gaps = [math.sqrt(squared_gap(row, rows_of(prototypes)[number])) for row in own]
            spread[number] = sum(gaps) / (len(own) * math.log(len(own) + 10))
    values = [spread.get(number, max(spread.values())) for number in range(5)]
    ordered = sorted(values)
    low = ordered[0] + 0.4 * (ordered[1] - ordered[0])
    high = ordered[3] + 0.6 * (ordered[4] - ordered[3])
    clipped = [min(max(value, low), high) for value in values]
    expected = [0.2 * value / (sum(clipped) / 5) for value in clipped]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert float(found.mean()) == pytest.approx(0.2)


def test_clusters_of_copies_get_the_temperature() -> None:
    prototypes = unit_rows(3)
    found = concentrations(prototypes.repeat(4, 1), prototypes, torch.arange(3).repeat(4), 0.2)
    torch.testing.assert_close(found, torch.full((3,), 0.2, dtype=torch.float64))


def test_the_cluster_contrast_equals_the_loop() -> None:
    anchors, prototypes, _ = clusters()
    centres = [prototypes, unit_rows(7, seed=2)]
    own = [torch.arange(12) % 5, torch.arange(12) % 7]
    spreads = [torch.linspace(0.1, 0.4, n, dtype=torch.float64) for n in (5, 7)]
    expected = slow_proto_nce(anchors, centres, own, spreads)
    assert float(proto_nce_loss(anchors, centres, own, spreads)) == pytest.approx(expected, rel=1e-12)


def test_a_cluster_for_each_sample_is_info_nce() -> None:
    anchors, keys = unit_rows(6), unit_rows(6, seed=1)
    spread = torch.full((6,), 0.2, dtype=torch.float64)
    expected = F.cross_entropy(anchors @ keys.T / 0.2, torch.arange(6))
    torch.testing.assert_close(proto_nce_loss(anchors, [keys], [torch.arange(6)], [spread]), expected)
