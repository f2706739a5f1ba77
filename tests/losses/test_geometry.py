"""Alignment and uniformity."""

from __future__ import annotations

import math

import pytest
import torch

from clipkit.losses.geometry import alignment, uniformity
from tests.losses.inputs import pairs, unit_rows
from tests.oracles import mean, rows_of, slow_uniformity, squared_gap


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_alignment_equals_the_loop(alpha: float) -> None:
    a, b = pairs()
    gaps = [math.sqrt(squared_gap(x, y)) ** alpha for x, y in zip(rows_of(a), rows_of(b), strict=True)]
    assert float(alignment(a, b, alpha)) == pytest.approx(mean(gaps), rel=1e-13)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_aligned_rows_have_a_finite_gradient(alpha: float) -> None:
    a = unit_rows().requires_grad_()
    value = alignment(a, a.detach().clone(), alpha)
    assert value.item() == 0
    assert not torch.autograd.grad(value, a)[0].any()


@pytest.mark.parametrize("t", [0.5, 2.0])
def test_uniformity_equals_the_double_loop(t: float) -> None:
    rows = unit_rows(9)
    assert float(uniformity(rows, t=t)) == pytest.approx(slow_uniformity(rows, t), rel=1e-12)


def test_collapse_is_zero_and_opposite_rows_the_least() -> None:
    rows = unit_rows(2)
    assert float(uniformity(rows[:1].expand(6, 5))) == pytest.approx(0, abs=1e-14)
    assert float(uniformity(torch.stack([rows[0], -rows[0]]))) == pytest.approx(-8)


def test_many_dimensions_are_uniform_at_minus_four() -> None:
    assert float(uniformity(unit_rows(64, 4096))) == pytest.approx(-4, abs=0.01)


def test_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two rows"):
        uniformity(unit_rows(1))
