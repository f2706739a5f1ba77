"""Losses against double loops, a peer, and the values that can be written down."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from clipkit.losses import clip_loss, info_nce, sigmoid_loss
from tests.oracles import slow_clip_loss, slow_sigmoid_loss


def pairs(count: int = 7, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two sets of unit vectors in float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    image, text = F.normalize(draw, dim=-1)
    return image, text


SCALE = torch.tensor([9.0], dtype=torch.float64)
BIAS = torch.tensor([-3.0], dtype=torch.float64)


def test_clip_loss_equals_the_double_loop() -> None:
    image, text = pairs()
    assert float(clip_loss(image, text, SCALE)) == pytest.approx(slow_clip_loss(image, text, 9.0), rel=1e-12)


def test_sigmoid_loss_equals_the_double_loop() -> None:
    image, text = pairs()
    expected = slow_sigmoid_loss(image, text, 9.0, -3.0)
    assert float(sigmoid_loss(image, text, SCALE, BIAS)) == pytest.approx(expected, rel=1e-12)


def test_open_clip_computes_the_same_values() -> None:
    image, text = pairs(16, 8)
    peer = ClipLoss()(image, text, SCALE)
    torch.testing.assert_close(clip_loss(image, text, SCALE), peer, rtol=1e-12, atol=0)
    peer = SigLipLoss()(image, text, SCALE, BIAS)
    torch.testing.assert_close(sigmoid_loss(image, text, SCALE, BIAS), peer, rtol=1e-12, atol=0)


def test_gradients_are_those_of_finite_differences() -> None:
    image, text = (x.requires_grad_() for x in pairs(4, 3))
    scale, bias = SCALE.clone().requires_grad_(), BIAS.clone().requires_grad_()
    assert torch.autograd.gradcheck(clip_loss, (image, text, scale))
    assert torch.autograd.gradcheck(sigmoid_loss, (image, text, scale, bias))


def test_order_of_rows_does_not_matter() -> None:
    image, text = pairs()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(clip_loss(image[order], text[order], SCALE), clip_loss(image, text, SCALE))
    torch.testing.assert_close(
        sigmoid_loss(image[order], text[order], SCALE, BIAS), sigmoid_loss(image, text, SCALE, BIAS)
    )


def test_image_and_text_can_change_places() -> None:
    image, text = pairs()
    torch.testing.assert_close(clip_loss(image, text, SCALE), clip_loss(text, image, SCALE))


def test_collapsed_embeddings_cost_log_of_the_batch() -> None:
    same = F.normalize(torch.ones(11, 4, dtype=torch.float64), dim=-1)
    assert float(clip_loss(same, same, SCALE)) == pytest.approx(math.log(11))


def test_one_way_loss_is_the_negative_log_of_the_softmax_at_the_positive() -> None:
    anchors, candidates = pairs(3, 4)
    positives = torch.tensor([2, 0, 1])
    expected = -torch.log_softmax(9.0 * anchors @ candidates.T, dim=1)[torch.arange(3), positives].mean()
    torch.testing.assert_close(info_nce(anchors, candidates, SCALE, positives), expected)


def test_siglip_starts_near_softplus_of_ten() -> None:
    image, text = pairs(64, 256)
    start = sigmoid_loss(image, text, SCALE.new_tensor([10.0]), BIAS.new_tensor([-10.0]))
    assert float(start) == pytest.approx(math.log(1 + math.exp(10)), abs=0.6)


@pytest.mark.parametrize("logit", [-500.0, 500.0])
def test_extreme_logits_stay_finite(logit: float) -> None:
    image, text = pairs()
    scale = SCALE.new_tensor([logit])
    assert math.isfinite(float(clip_loss(image, text, scale)))
    assert math.isfinite(float(sigmoid_loss(image, text, scale, BIAS)))
