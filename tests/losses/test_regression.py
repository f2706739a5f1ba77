"""Regression losses: BYOL, SimSiam, feature distillation."""

from __future__ import annotations

import pytest
import torch

from clipkit.losses.regression import byol_loss, feature_distillation_loss, regression_loss, simsiam_loss
from tests.losses.inputs import pairs, unit_rows
from tests.oracles import rows_of, slow_cosine_regression, squared_gap


def test_it_is_the_squared_distance_of_directions() -> None:
    a, b = pairs()
    a, b = 3 * a, 0.1 * b
    assert float(regression_loss(a, b)) == pytest.approx(slow_cosine_regression(a, b), rel=1e-13)


def test_each_view_predicts_the_target_of_the_other() -> None:
    predicted, targets = pairs(seed=1), pairs(seed=2)
    expected = slow_cosine_regression(predicted[0], targets[1]) + slow_cosine_regression(
        predicted[1], targets[0]
    )
    assert float(byol_loss(*predicted, *targets)) == pytest.approx(expected, rel=1e-13)


def test_simsiam_is_byol_in_another_unit() -> None:
    predicted, targets = pairs(seed=1), pairs(seed=2)
    cosines = [(predicted[i] * targets[1 - i]).sum(1).mean() for i in (0, 1)]
    torch.testing.assert_close(simsiam_loss(*predicted, *targets), -(cosines[0] + cosines[1]) / 2)


def test_the_ends_of_the_range() -> None:
    a, b = pairs()
    assert float(byol_loss(a, b, b, a)) == pytest.approx(0, abs=1e-14)
    assert float(byol_loss(a, b, -b, -a)) == pytest.approx(8)
    assert float(simsiam_loss(a, b, b, a)) == pytest.approx(-1)


def test_targets_get_no_gradient() -> None:
    rows = [unit_rows(seed=seed).requires_grad_() for seed in range(4)]
    byol_loss(*rows).backward()
    assert [row.grad is None for row in rows] == [False, False, True, True]
    teacher = unit_rows(seed=5).requires_grad_()
    feature_distillation_loss(rows[0], teacher).backward()
    assert teacher.grad is None


def test_feature_distillation_is_the_mean_over_all_entries() -> None:
    a, b = pairs()
    expected = sum(squared_gap(x, y) for x, y in zip(rows_of(a), rows_of(b), strict=True)) / (7 * 5)
    assert float(feature_distillation_loss(a, b)) == pytest.approx(expected)
    with pytest.raises(ValueError, match="project"):
        feature_distillation_loss(a, b[:, :4])
