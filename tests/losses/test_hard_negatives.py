"""Hard negatives: weights, debiasing, and hard captions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clipkit.losses.contrastive import Form, contrastive_loss, two_view_logits
from clipkit.losses.hard_negatives import (
    hard_clip_loss,
    hard_columns,
    hard_info_nce,
    hcl_loss,
    weighted_loss,
)
from clipkit.losses.softmax import clip_loss, dcl_loss, info_nce, nt_xent_loss
from tests.losses.inputs import pairs, unit_rows
from tests.oracles import dot, rows_of, slow_hard_captions, slow_hcl


@pytest.mark.parametrize("form", ["out", "decoupled"])
@pytest.mark.parametrize("tau_plus", [0.0, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_weighted_debiased_loss_equals_the_double_loop(beta: float, tau_plus: float, form: Form) -> None:
    a, b = pairs()
    loss, bound = slow_hcl(a, b, 2.0, beta, tau_plus, form == "decoupled")
    found = hcl_loss(a, b, 2.0, beta=beta, tau_plus=tau_plus, form=form)
    assert float(found.loss) == pytest.approx(loss, rel=1e-12)
    assert float(found.clamped) == pytest.approx(bound)


def test_the_grid_above_has_anchors_on_both_sides_of_the_bound() -> None:
    a, b = pairs()
    fractions = [float(hcl_loss(a, b, 2.0, tau_plus=tau_plus).clamped) for tau_plus in (0.01, 0.1, 0.5)]
    assert fractions[0] == 0
    assert 0 < fractions[1] < 1 or 0 < fractions[2] < 1


def test_no_hardness_and_no_bias_is_nt_xent() -> None:
    a, b = pairs()
    found = hcl_loss(a, b, 5.0, beta=0.0, tau_plus=0.0)
    torch.testing.assert_close(found.loss, nt_xent_loss(a, b, 5.0), rtol=1e-14, atol=0)
    assert float(found.clamped) == 0
    assert float(found.effective) == pytest.approx(12)


def test_unbounded_hardness_is_the_hardest_negative_n_times() -> None:
    a, b = pairs()
    from_a, from_b, positives = two_view_logits(a, b, 5.0)
    rows = torch.cat([from_a, from_b])
    own = rows.gather(1, positives.repeat(2)[:, None])
    hardest = rows.scatter(1, positives.repeat(2)[:, None], -math.inf).amax(1, keepdim=True) + math.log(12)
    expected = (torch.cat([own, hardest], 1).logsumexp(1) - own[:, 0]).mean()
    found = hcl_loss(a, b, 5.0, beta=5000.0, tau_plus=0.0)
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    assert float(found.effective) == pytest.approx(1)


def test_the_loss_grows_with_hardness() -> None:
    a, b = pairs()
    costs = [float(hcl_loss(a, b, 5.0, beta=beta, tau_plus=0.0).loss) for beta in (0, 0.1, 0.5, 1, 2, 5, 50)]
    assert costs == sorted(costs)
    assert len(set(costs)) == len(costs)


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_weights_in_the_kernel_are_the_same_loss_and_detached_the_same_gradient(beta: float) -> None:
    a, b = (x.requires_grad_() for x in pairs())
    parts = []
    for logits, positives in zip(two_view_logits(a, b, 5.0)[:2], [torch.arange(7)] * 2, strict=True):
        negative = torch.isfinite(logits.detach()).scatter(1, positives[:, None], False)
        tilt = logits.detach().masked_fill(~negative, 0).mul(beta).exp() * negative
        weights = torch.where(negative, 12 * tilt / tilt.sum(1, keepdim=True), 1)
        parts.append(contrastive_loss(logits, positives, log_weights=weights.log()))
    expected = (parts[0] + parts[1]) / 2
    found = hcl_loss(a, b, 5.0, beta=beta, tau_plus=0.0, detach=True).loss
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, (a, b)), torch.autograd.grad(expected, (a, b)))


def test_detaching_changes_the_gradient_alone() -> None:
    a, b = (x.requires_grad_() for x in pairs())
    through = hcl_loss(a, b, 2.0, beta=1.0, tau_plus=0.1).loss
    around = hcl_loss(a, b, 2.0, beta=1.0, tau_plus=0.1, detach=True).loss
    assert through.item() == around.item()
    assert not torch.allclose(torch.autograd.grad(through, a)[0], torch.autograd.grad(around, a)[0])


@pytest.mark.parametrize("beta", [0.0, 0.25, 5.0])
def test_single_precision_survives_the_scale_of_clip(beta: float) -> None:
    a, b = (x.float().requires_grad_() for x in pairs(32, 16))
    # Perfect pairs too: there the bias exceeds the negatives by more than an exponential can hold.
    for other in (b, a):
        found = hcl_loss(a, other, 100.0, beta=beta, tau_plus=0.1)
        assert torch.isfinite(found.loss)
        assert all(torch.isfinite(slope).all() for slope in torch.autograd.grad(found.loss, (a, other)))


def test_an_anchor_at_the_bound_pulls_its_positive_and_ignores_negatives() -> None:
    logits = torch.tensor([[5.0, -1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    columns, clamped, _ = hard_columns(logits, torch.tensor([0]), -5.0, tau_plus=0.5)
    assert float(clamped) == 1
    loss = contrastive_loss(columns, torch.tensor([0]))
    slope = torch.autograd.grad(loss, logits)[0][0]
    assert slope[0] < 0
    assert not slope[1:].any()


def test_the_decoupled_form_without_weights_is_the_decoupled_loss() -> None:
    a, b = pairs()
    found = hcl_loss(a, b, 5.0, beta=0.0, tau_plus=0.0, form="decoupled")
    torch.testing.assert_close(found.loss, dcl_loss(a, b, 5.0), rtol=1e-14, atol=0)


def test_one_way_without_weights_is_info_nce() -> None:
    a, b = pairs()
    found = weighted_loss(5.0 * a @ b.T, torch.arange(7), 5.0, beta=0.0)
    torch.testing.assert_close(found.loss, info_nce(a, b, 5.0, torch.arange(7)), rtol=1e-14, atol=0)


def test_negatives_can_be_taken_out() -> None:
    logits, keep = 3 * unit_rows(4, 6), torch.ones(4, 6, dtype=torch.bool)
    keep[:, 4:] = False
    positives = torch.arange(4)
    fewer = hard_columns(logits[:, :4], positives, -3.0, tau_plus=0.1)
    torch.testing.assert_close(hard_columns(logits, positives, -3.0, tau_plus=0.1, keep=keep), fewer)


def captions(seed: int = 5) -> tuple[Tensor, Tensor]:
    present = torch.tensor([[True, True], [True, False], [False, False], [False, True], [True, True]])
    return unit_rows(10, seed=seed).view(5, 2, 5), present


def test_hard_captions_equal_the_double_loop() -> None:
    image, text = pairs(5)
    hard, present = captions()
    expected = slow_hard_captions(image, text, hard, present, 5.0)
    found = hard_clip_loss(image, text, 5.0, hard=hard, present=present).loss
    assert float(found) == pytest.approx(expected, rel=1e-13)
    everyone = slow_hard_captions(image, text, hard, torch.ones(5, 2, dtype=torch.bool), 5.0)
    assert float(hard_clip_loss(image, text, 5.0, hard=hard).loss) == pytest.approx(everyone, rel=1e-13)


def test_absent_captions_have_no_influence_and_no_gradient() -> None:
    image, text = pairs(5)
    hard, present = captions()
    other = torch.where(present[..., None], hard, 1e3).requires_grad_()
    found = hard_clip_loss(image, text, 5.0, hard=other, present=present, beta=0.3, tau_plus=0.05)
    expected = hard_clip_loss(image, text, 5.0, hard=hard, present=present, beta=0.3, tau_plus=0.05)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    slope = torch.autograd.grad(found.loss, other)[0]
    assert not slope[~present].any()
    assert slope[present].any(1).all()


def test_without_captions_and_weights_it_is_clip() -> None:
    image, text = pairs(5)
    hard, present = captions()
    expected = clip_loss(image, text, 5.0)
    nothing = hard_clip_loss(image, text, 5.0, hard=hard, present=torch.zeros_like(present))
    torch.testing.assert_close(nothing.loss, expected)
    torch.testing.assert_close(hard_clip_loss(image, text, 5.0).loss, expected)
    assert float(hard_clip_loss(image, text, 5.0).effective) == pytest.approx(4)


def test_hard_captions_only_add_cost_and_only_for_images() -> None:
    image, text = pairs(5)
    hard, _ = captions()
    extra = hard_clip_loss(image, text, 5.0, hard=hard).loss - clip_loss(image, text, 5.0)
    own = torch.arange(5)
    one_way = hard_info_nce(image, text, hard, 5.0) - info_nce(image, text, 5.0, own)
    assert float(extra) > 0
    torch.testing.assert_close(extra, one_way / 2)


def test_the_own_hard_negative_can_weigh_more() -> None:
    anchors, candidates = pairs(5)
    hard, present = captions()
    costs = []
    for i, anchor in enumerate(rows_of(anchors)):
        below = sum(math.exp(5 * dot(anchor, c)) for c in rows_of(candidates))
        for k in range(5):
            for m in range(2):
                weight = (3.0 if k == i else 1.0) * float(present[k, m])
                below += weight * math.exp(5 * dot(anchor, rows_of(hard[k])[m]))
        costs.append(math.log(below) - 5 * dot(anchor, rows_of(candidates)[i]))
    found = hard_info_nce(anchors, candidates, hard, 5.0, present=present, own_bonus=math.log(3))
    assert float(found) == pytest.approx(sum(costs) / 5, rel=1e-13)


def test_one_sample_is_refused() -> None:
    one = unit_rows(1)
    for loss in (hcl_loss, hard_clip_loss):
        with pytest.raises(ValueError, match="at least two samples"):
            loss(one, one, 5.0)
