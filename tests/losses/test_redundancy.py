"""Barlow Twins: the cross-correlation of two views' dimensions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clipkit.losses.redundancy import barlow_twins_loss, standardised
from tests.losses.inputs import pairs, rotation
from tests.oracles import slow_barlow_twins


@pytest.mark.parametrize("off_diagonal", [0.0, 0.0051, 1.0])
def test_it_equals_the_double_loop(off_diagonal: float) -> None:
    a, b = pairs(9, 4)
    expected = slow_barlow_twins(a, b, off_diagonal, 1e-5)
    assert float(barlow_twins_loss(a, b, off_diagonal=off_diagonal)) == pytest.approx(expected, rel=1e-12)


def test_every_dimension_has_its_own_unit() -> None:
    a, b = pairs(9, 4)
    size = torch.tensor([0.3, 5.0, 70.0, 1.0], dtype=torch.float64)
    shift = torch.tensor([9.0, -4.0, 0.1, 0.0], dtype=torch.float64)
    expected = barlow_twins_loss(a, b, eps=0.0)
    torch.testing.assert_close(barlow_twins_loss(a * size + shift, b, eps=0.0), expected)
    torch.testing.assert_close(barlow_twins_loss(a, b * size + shift, eps=0.0), expected)


def test_dimensions_can_be_renumbered_together_but_not_mixed() -> None:
    a, b = pairs(9, 4)
    order = torch.tensor([2, 0, 3, 1])
    expected = barlow_twins_loss(a, b, off_diagonal=0.2)
    torch.testing.assert_close(barlow_twins_loss(a[:, order], b[:, order], off_diagonal=0.2), expected)
    turned = barlow_twins_loss(a @ rotation(4), b @ rotation(4), off_diagonal=0.2)
    assert abs(float(turned - expected)) > 0.01


def whitened(x: Tensor) -> Tensor:
    return torch.linalg.qr(x - x.mean(0))[0] * len(x) ** 0.5


def test_equal_views_of_independent_dimensions_cost_nothing() -> None:
    a = whitened(pairs(9, 4)[0])
    assert float(barlow_twins_loss(a, a, off_diagonal=1.0, eps=0.0)) == pytest.approx(0, abs=1e-25)


def test_a_collapsed_dimension_costs_one() -> None:
    a = whitened(pairs(9, 4)[0])
    for dead in range(5):
        collapsed = torch.cat(
            [a[:, dead:], torch.full((9, dead), 0.7, dtype=torch.float64)], 1
        ).requires_grad_()
        cost = barlow_twins_loss(collapsed, collapsed)
        assert cost.item() == pytest.approx(dead, abs=1e-8)
        assert torch.isfinite(torch.autograd.grad(cost, collapsed)[0]).all()


def test_a_redundant_dimension_costs_twice_the_factor() -> None:
    a = whitened(pairs(9, 4)[0])
    doubled = a[:, [0, 1, 2, 2]]
    assert float(barlow_twins_loss(doubled, doubled, off_diagonal=0.3, eps=0.0)) == pytest.approx(0.6)


def test_rows_far_from_zero_keep_their_digits() -> None:
    a, _ = pairs(9, 4)
    exact = standardised(a)
    torch.testing.assert_close(standardised((a + 100).float()).double(), exact, rtol=0, atol=1e-3)
