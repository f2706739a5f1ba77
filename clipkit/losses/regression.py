"""Regression losses: predict the features of another view or of a teacher. No negatives, no collectives."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def regression_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Returns the mean over rows of 2 - 2 cos(predicted, target), in [0, 4], ().

    predicted, target (B, D) of any length; the target gets no gradient. BYOL, arXiv:2006.07733 eq. 2.
    """
    return 2 - 2 * F.cosine_similarity(predicted, target.detach(), dim=1).mean()


def byol_loss(predicted_a: Tensor, predicted_b: Tensor, target_a: Tensor, target_b: Tensor) -> Tensor:
    """Returns the sum of both directions: a predicts the target of b and b that of a, in [0, 8], ().

    All (B, D). BYOL, arXiv:2006.07733 sec. 3.1. Near 0 from the start means collapse, not success.
    """
    return regression_loss(predicted_a, target_b) + regression_loss(predicted_b, target_a)


def simsiam_loss(predicted_a: Tensor, predicted_b: Tensor, target_a: Tensor, target_b: Tensor) -> Tensor:
    """Returns the mean of both directions of -cos, in [-1, 1], (). SimSiam, arXiv:2011.10566 eq. 1-2."""
    return byol_loss(predicted_a, predicted_b, target_a, target_b) / 4 - 1


def feature_distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the mean squared difference over all entries, (), in squared units of the features.

    student, teacher (B, D) L2-normalised; the teacher gets no gradient. CLIP-KD, arXiv:2307.12732
    (FD), with the mean over D as in its code, which weighs it by 2000. Raises ValueError when widths differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ: project")
    return F.mse_loss(student, teacher.detach())
