"""The losses that open_clip has too, computed by open_clip."""

from __future__ import annotations

import torch
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss

from clipkit.losses import clip_loss, distillation_loss, sigmoid_loss
from clipkit.losses.affinity import TeacherPair
from tests.losses.inputs import pairs

SCALE = torch.tensor([9.0], dtype=torch.float64)
BIAS = torch.tensor([-3.0], dtype=torch.float64)


def test_clip_and_siglip_are_those_of_open_clip() -> None:
    image, text = (x.requires_grad_() for x in pairs(16, 8))
    for ours, theirs in (
        (clip_loss(image, text, SCALE), ClipLoss()(image, text, SCALE)),
        (sigmoid_loss(image, text, SCALE, BIAS), SigLipLoss()(image, text, SCALE, BIAS)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
        slopes = [torch.autograd.grad(loss, (image, text)) for loss in (ours, theirs)]
        torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-10, atol=1e-15)


def test_distillation_is_that_of_open_clip() -> None:
    image, text = (x.requires_grad_() for x in pairs(16, 8))
    teacher = pairs(16, 12, seed=4)
    _, theirs = DistillClipLoss()(image, text, SCALE, *teacher, 3 * SCALE)
    ours = distillation_loss(image, text, SCALE, [TeacherPair(*teacher, 3 * SCALE)])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    slopes = [torch.autograd.grad(loss, (image, text)) for loss in (ours, theirs)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-10, atol=1e-15)
