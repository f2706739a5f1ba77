"""Affinity losses: distillation and consistency."""

from __future__ import annotations

import pytest
import torch

from clipkit.losses.affinity import TeacherPair, cyclip_terms, distillation_loss, teacher_targets
from clipkit.losses.softmax import clip_loss
from tests.losses.inputs import pairs, rotation
from tests.oracles import slow_cyclip, slow_distillation

TEACHERS = [TeacherPair(*pairs(seed=3), 8.0), TeacherPair(*pairs(width=9, seed=4), 2.0)]


@pytest.mark.parametrize("teachers", [TEACHERS[:1], TEACHERS[1:], TEACHERS])
def test_distillation_equals_the_double_loop(teachers: list[TeacherPair]) -> None:
    image, text = pairs()
    expected = slow_distillation(image, text, 5.0, [(t.image, t.text, float(t.scale)) for t in teachers])
    assert float(distillation_loss(image, text, 5.0, teachers)) == pytest.approx(expected, rel=1e-12)


def test_a_student_that_is_the_teacher_pays_its_entropy_and_stays() -> None:
    image, text = (x.requires_grad_() for x in pairs())
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    teacher = TeacherPair(image.detach(), text.detach(), 5.0)
    loss = distillation_loss(image, text, scale, [teacher])
    targets = teacher_targets([teacher])
    entropy = -sum((p * p.log()).sum(1).mean() for p in targets) / 2
    torch.testing.assert_close(loss.detach(), entropy)
    for slope in torch.autograd.grad(loss, (image, text, scale)):
        assert slope.abs().max() < 1e-15


def test_a_certain_teacher_is_clip() -> None:
    image, text = pairs()
    certain = TeacherPair(image, image, 1e5)
    torch.testing.assert_close(distillation_loss(image, text, 5.0, [certain]), clip_loss(image, text, 5.0))


def test_teachers_get_no_gradient_and_are_averaged_as_probabilities() -> None:
    image, text = (x.requires_grad_() for x in pairs())
    found = teacher_targets([TeacherPair(image, text, 5.0), TEACHERS[1]])
    assert not found[0].requires_grad
    single = [teacher_targets([t]) for t in (TeacherPair(image, text, 5.0), TEACHERS[1])]
    torch.testing.assert_close(found[1], (single[0][1] + single[1][1]) / 2)
    with pytest.raises(ValueError, match="at least one teacher"):
        distillation_loss(image, text, 5.0, [])


def test_consistency_equals_the_double_loop() -> None:
    image, text = pairs()
    found = cyclip_terms(image, text)
    in_modal, cross_modal = slow_cyclip(image, text)
    assert float(found.in_modal) == pytest.approx(in_modal, rel=1e-12)
    assert float(found.cross_modal) == pytest.approx(cross_modal, rel=1e-12)


def test_texts_that_are_rotated_images_are_consistent_within_modalities() -> None:
    image, _ = pairs()
    found = cyclip_terms(image, image @ rotation(5))
    assert float(found.in_modal) == pytest.approx(0, abs=1e-25)
    assert float(found.cross_modal) > 0.1
    # A symmetric rotation also makes image-to-text the mirror of text-to-image.
    mirror = torch.diag(torch.tensor([1.0, -1, 1, -1, 1], dtype=torch.float64))
    assert sum(map(float, cyclip_terms(image, image @ mirror))) == pytest.approx(0, abs=1e-25)
