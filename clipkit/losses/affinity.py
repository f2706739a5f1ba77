"""Losses on affinities: imitate those of teachers, and keep those of image and text consistent.

Shapes: B rows on this rank, N = B * W gathered rows, D width of the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clipkit.losses.contrastive import Gather, Scale, alone
from clipkit.losses.softmax import soft_clip_loss


class TeacherPair(NamedTuple):
    """One teacher's L2-normalised image and text features, (B, Dn) of any width, and its scale."""

    image: Tensor
    text: Tensor
    scale: Scale


@torch.no_grad()
def teacher_targets(teachers: Sequence[TeacherPair], gather: Gather = alone) -> tuple[Tensor, Tensor]:
    """Returns (image-to-text, text-to-image) probabilities of this rank's rows, each (B, N), no gradient.

    Several teachers are averaged AFTER the softmax, so that each keeps its own scale and width.
    """
    from_image = [(t.scale * t.image @ gather(t.text).T).softmax(1) for t in teachers]
    from_text = [(t.scale * t.text @ gather(t.image).T).softmax(1) for t in teachers]
    return torch.stack(from_image).mean(0), torch.stack(from_text).mean(0)


def distillation_loss(
    image: Tensor,
    text: Tensor,
    scale: Scale,
    teachers: Sequence[TeacherPair],
    gather: Gather = alone,
) -> Tensor:
    """Returns the cross-entropy of the teachers' affinity rows and the student's, mean of directions, ().

    image, text (B, D) L2-normalised student features with their scale. In nats; its minimum is the entropy
    of the teachers, not 0. Affinity mimicking, TinyCLIP, arXiv:2309.12314; averaged teachers,
    MobileCLIP, arXiv:2311.17049. Raises ValueError without a teacher.
    """
    if not teachers:
        raise ValueError("distillation needs at least one teacher")
    image_targets, text_targets = teacher_targets(teachers, gather)
    return soft_clip_loss(image, text, scale, image_targets, text_targets, gather)


class Consistency(NamedTuple):
    """The two terms of CyCLIP, each (), in squared cosines summed over candidates."""

    in_modal: Tensor
    cross_modal: Tensor


def cyclip_terms(image: Tensor, text: Tensor, gather: Gather = alone) -> Consistency:
    """Returns how far image-image and text-text, and image-text and text-image cosines are apart.

    image, text (B, D) L2-normalised. in_modal = 1/N sum_jk (<i_j, i_k> - <t_j, t_k>)^2 and cross_modal =
    1/N sum_jk (<i_j, t_k> - <i_k, t_j>)^2, CyCLIP, arXiv:2205.14459 with the factor of its code
    (1/N, so both grow with N; the authors weigh each by 0.25). A rank returns its rows j over B.
    """
    images, texts = gather(image), gather(text)
    in_modal = (image @ images.T - text @ texts.T).square().sum() / image.shape[0]
    cross_modal = (image @ texts.T - text @ images.T).square().sum() / image.shape[0]
    return Consistency(in_modal, cross_modal)
