"""Binary losses: SigLIP, noise-contrastive estimation, negative sampling."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from clipkit.losses.sigmoid import nce_loss, sgns_loss, sigmoid_loss
from tests.losses.inputs import pairs, unit_rows
from tests.oracles import slow_nce, slow_sigmoid_loss

SCALE = torch.tensor([9.0], dtype=torch.float64)
BIAS = torch.tensor([-3.0], dtype=torch.float64)


def test_sigmoid_loss_equals_the_double_loop() -> None:
    image, text = pairs()
    expected = slow_sigmoid_loss(image, text, 9.0, -3.0)
    assert float(sigmoid_loss(image, text, SCALE, BIAS)) == pytest.approx(expected, rel=1e-12)


def test_sigmoid_loss_has_the_gradient_of_finite_differences_in_scale_and_bias_too() -> None:
    image, text = (x.requires_grad_() for x in pairs(4, 3))
    scale, bias = SCALE.clone().requires_grad_(), BIAS.clone().requires_grad_()
    assert torch.autograd.gradcheck(sigmoid_loss, (image, text, scale, bias))


def test_siglip_starts_near_softplus_of_ten() -> None:
    image, text = pairs(64, 256)
    start = sigmoid_loss(image, text, SCALE.new_tensor([10.0]), BIAS.new_tensor([-10.0]))
    assert float(start) == pytest.approx(math.log(1 + math.exp(10)), abs=0.6)


@pytest.mark.parametrize("logit", [-500.0, 500.0])
def test_extreme_logits_stay_finite(logit: float) -> None:
    image, text = pairs()
    assert math.isfinite(float(sigmoid_loss(image, text, SCALE.new_tensor([logit]), BIAS)))


def test_orthogonal_negatives_cost_the_softplus_of_the_bias_each() -> None:
    rows = torch.eye(6, dtype=torch.float64)
    few, many = (float(sigmoid_loss(rows[:n], rows[:n], SCALE, BIAS)) for n in (3, 6))
    assert many - few == pytest.approx(3 * math.log(1 + math.exp(-3.0)))


def noise(seed: int = 0) -> list[torch.Tensor]:
    """Scores and log-noise of 5 data with 4 noise samples each."""
    draw = 2 * unit_rows(5, 10, seed)
    return [draw[:, 0], draw[:, 1:5], draw[:, 5] - 2, draw[:, 6:] - 2]


def test_noise_contrast_is_logistic_regression_of_data_against_noise() -> None:
    assert float(nce_loss(*noise())) == pytest.approx(slow_nce(*noise()), rel=1e-13)


def test_noise_of_density_one_over_the_number_of_samples_is_negative_sampling() -> None:
    positive, negative, log_positive, log_negative = noise()
    flat = [torch.full_like(x, -math.log(4)) for x in (log_positive, log_negative)]
    torch.testing.assert_close(nce_loss(positive, negative, *flat), sgns_loss(positive, negative))


def test_siglip_is_negative_sampling_with_the_batch_as_noise() -> None:
    image, text = pairs()
    logits = SCALE * image @ text.T + BIAS
    off = ~torch.eye(7, dtype=torch.bool)
    expected = sgns_loss(logits.diagonal(), logits[off].view(7, 6))
    torch.testing.assert_close(sigmoid_loss(image, text, SCALE, BIAS), expected)


def test_scores_become_log_probabilities_without_being_told_to() -> None:
    # Data in the exact proportions 4:3:2:1, and with each datum every kind once as uniform noise.
    data, kinds = torch.tensor([0] * 4 + [1] * 3 + [2] * 2 + [3]), torch.arange(4).expand(10, 4)
    score = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    log_noise = torch.full((10, 4), -math.log(4), dtype=torch.float64)
    optimizer = torch.optim.LBFGS(
        [score], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = nce_loss(score[data], score[kinds], log_noise[:, 0], log_noise)
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    torch.testing.assert_close(score.detach().exp(), probabilities, rtol=1e-6, atol=0)


def test_extreme_scores_stay_finite() -> None:
    huge = torch.tensor([1e4, -1e4])
    assert torch.isfinite(sgns_loss(huge, F.pad(huge[:, None], (0, 1))))
