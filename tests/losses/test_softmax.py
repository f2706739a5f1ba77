"""The softmax family against double loops, and where its members are the same thing."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.losses.contrastive import Form, contrastive_loss
from clipkit.losses.hard_negatives import hard_clip_loss, hcl_loss
from clipkit.losses.softmax import (
    clip_loss,
    dcl_loss,
    info_nce,
    moco_loss,
    nt_xent_loss,
    soft_clip_loss,
    supcon_loss,
    unicl_loss,
)
from tests.losses.inputs import pairs, unit_rows
from tests.oracles import (
    slow_clip_loss,
    slow_cross_entropy,
    slow_dcl,
    slow_moco,
    slow_nt_xent,
    slow_supcon,
    slow_unicl,
)

LABELS = torch.tensor([4, 1, 4, -1, 4, 1, -1, 6])
SCALE = torch.tensor([9.0], dtype=torch.float64)


def test_clip_loss_equals_the_double_loop() -> None:
    image, text = pairs()
    assert float(clip_loss(image, text, SCALE)) == pytest.approx(slow_clip_loss(image, text, 9.0), rel=1e-12)


def test_clip_loss_has_the_gradient_of_finite_differences_in_its_scale_too() -> None:
    image, text = (x.requires_grad_() for x in pairs(4, 3))
    assert torch.autograd.gradcheck(clip_loss, (image, text, SCALE.clone().requires_grad_()))


def test_clip_loss_is_the_mean_of_two_one_way_losses() -> None:
    image, text = pairs()
    own = torch.arange(7)
    expected = (info_nce(image, text, SCALE, own) + info_nce(text, image, SCALE, own)) / 2
    torch.testing.assert_close(clip_loss(image, text, SCALE), expected, rtol=1e-15, atol=0)


def test_one_way_loss_is_the_negative_log_of_the_softmax_at_the_positive() -> None:
    anchors, candidates = pairs(3, 4)
    positives = torch.tensor([2, 0, 1])
    expected = -torch.log_softmax(9.0 * anchors @ candidates.T, dim=1)[torch.arange(3), positives].mean()
    torch.testing.assert_close(info_nce(anchors, candidates, SCALE, positives), expected)


@pytest.mark.parametrize("logit", [-500.0, 500.0])
def test_extreme_scales_stay_finite(logit: float) -> None:
    image, text = pairs()
    for loss in (clip_loss, nt_xent_loss, dcl_loss):
        assert math.isfinite(float(loss(image, text, SCALE.new_tensor([logit]))))


def test_nt_xent_equals_the_double_loop() -> None:
    a, b = pairs()
    assert float(nt_xent_loss(a, b, 5.0)) == pytest.approx(slow_nt_xent(a, b, 5.0), rel=1e-13)


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("sigma", [None, 0.5, 0.1])
def test_the_decoupled_loss_equals_the_double_loop(sigma: float | None, within: bool) -> None:
    a, b = pairs()
    expected = slow_dcl(a, b, 5.0, sigma, within)
    assert float(dcl_loss(a, b, 5.0, sigma=sigma, within=within)) == pytest.approx(expected, rel=1e-12)


def test_the_weights_of_dclw_get_no_gradient() -> None:
    a, b = (x.requires_grad_() for x in pairs())
    agreement = (a * b).sum(1)
    weights = (2 - 7 * (agreement / 0.5).softmax(0)).detach()
    expected = dcl_loss(a, b, 5.0) + (5.0 * (1 - weights) * agreement).mean()
    torch.testing.assert_close(
        torch.autograd.grad(dcl_loss(a, b, 5.0, sigma=0.5), (a, b)), torch.autograd.grad(expected, (a, b))
    )


def test_equal_agreement_makes_dclw_the_decoupled_loss() -> None:
    a, _ = pairs()
    torch.testing.assert_close(dcl_loss(a, a, 5.0, sigma=0.5), dcl_loss(a, a, 5.0))


def test_the_decoupled_loss_stays_above_its_floor() -> None:
    a = unit_rows(2, 6)
    opposite = torch.stack([a[0], -a[0]])
    floor = -2 * 5.0 + math.log(2 * 2 - 2)
    assert float(dcl_loss(opposite, opposite, 5.0)) == pytest.approx(floor)
    assert float(dcl_loss(*pairs(), 5.0)) > floor


@pytest.mark.parametrize("form", ["out", "in"])
def test_supervised_loss_equals_the_double_loop(form: Form) -> None:
    a, b = pairs(8)
    for views in ([a, b], [a]):
        found = supcon_loss(a, views[1] if len(views) > 1 else None, LABELS, 5.0, form=form)
        assert float(found) == pytest.approx(slow_supcon(views, LABELS.tolist(), 5.0, form), rel=1e-13)


def test_unique_labels_make_the_supervised_loss_nt_xent_and_unicl_clip() -> None:
    a, b = pairs(8)
    for labels in (torch.arange(8) * 3 + 1, torch.full((8,), -1)):
        for form in ("out", "in"):
            found = supcon_loss(a, b, labels, 5.0, form=form)
            torch.testing.assert_close(found, nt_xent_loss(a, b, 5.0), rtol=1e-14, atol=0)
        torch.testing.assert_close(unicl_loss(a, b, labels, 5.0), clip_loss(a, b, 5.0), rtol=1e-14, atol=0)


def test_unicl_equals_the_double_loop_and_knows_no_names() -> None:
    a, b = pairs(8)
    labels = torch.tensor([0, 1, 0, 2, 0, 1, 3, 3])
    expected = slow_unicl(a, b, labels.tolist(), 5.0)
    assert float(unicl_loss(a, b, labels, 5.0)) == pytest.approx(expected, rel=1e-13)
    renamed = torch.tensor([2**62, 7, 5, 0])[labels]
    assert unicl_loss(a, b, renamed, 5.0) == unicl_loss(a, b, labels, 5.0)
    assert supcon_loss(a, b, renamed, 5.0) == supcon_loss(a, b, labels, 5.0)


def test_perfect_classes_cost_the_log_of_their_size() -> None:
    # Every class at its own corner: the best the outer form can do, at a scale where nothing else counts.
    a = torch.eye(4, dtype=torch.float64).repeat_interleave(3, 0)
    labels = torch.arange(4).repeat_interleave(3)
    assert float(supcon_loss(a, None, labels, 200.0)) == pytest.approx(math.log(2))
    assert float(unicl_loss(a, a, labels, 200.0)) == pytest.approx(math.log(3))
    assert float(supcon_loss(a, a, labels, 200.0)) == pytest.approx(math.log(5))


def test_soft_targets_equal_the_double_loop() -> None:
    a, b = pairs()
    image_targets, text_targets = unit_rows(7, 7, 3).abs(), unit_rows(7, 7, 4).abs()
    expected = slow_cross_entropy(5 * a @ b.T, image_targets) + slow_cross_entropy(5 * b @ a.T, text_targets)
    found = soft_clip_loss(a, b, 5.0, image_targets, text_targets)
    assert float(found) == pytest.approx(expected / 2, rel=1e-13)
    eye = torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(soft_clip_loss(a, b, 5.0, eye, eye), clip_loss(a, b, 5.0))


def test_collapsed_embeddings_cost_the_log_of_the_candidates() -> None:
    same = F.normalize(torch.ones(11, 4, dtype=torch.float64), dim=-1)
    assert float(clip_loss(same, same, SCALE)) == pytest.approx(math.log(11))
    assert float(nt_xent_loss(same, same, SCALE)) == pytest.approx(math.log(21))
    assert float(dcl_loss(same, same, SCALE)) == pytest.approx(math.log(20))
    assert float(moco_loss(same, same, same, SCALE)) == pytest.approx(math.log(12))


def test_one_sample_is_refused_where_there_would_be_no_negative() -> None:
    one = unit_rows(1)
    for loss in (nt_xent_loss, dcl_loss):
        with pytest.raises(ValueError, match="at least two samples"):
            loss(one, one, SCALE)


def test_the_queue_gives_the_negatives() -> None:
    queries, keys = pairs()
    queue = unit_rows(9, seed=5)
    expected = slow_moco(queries, keys, queue, 5.0)
    assert float(moco_loss(queries, keys, queue, 5.0)) == pytest.approx(expected, rel=1e-13)
    for valid in (4, torch.tensor(4), torch.tensor([4])):
        expected = slow_moco(queries, keys, queue[:4], 5.0)
        assert float(moco_loss(queries, keys, queue, 5.0, valid)) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("junk", [0.0, 1e6])
def test_an_empty_queue_costs_nothing_whatever_it_holds(junk: float) -> None:
    queries, keys = pairs()
    queries.requires_grad_()
    loss = moco_loss(queries, keys, torch.full((9, 5), junk, dtype=torch.float64), 5.0, 0)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, queries)[0].abs().max() < 1e-15


def test_keys_and_queue_get_no_gradient() -> None:
    queries, keys = (x.requires_grad_() for x in pairs())
    queue = unit_rows(9, seed=5).requires_grad_()
    moco_loss(queries, keys, queue, 5.0).backward()
    assert queries.grad is not None
    assert keys.grad is None
    assert queue.grad is None


def test_a_query_against_a_queue_of_the_other_keys_is_info_nce() -> None:
    queries, keys = pairs()
    others = [
        moco_loss(queries[i : i + 1], keys[i : i + 1], keys[torch.arange(7) != i], 5.0) for i in range(7)
    ]
    torch.testing.assert_close(torch.stack(others).mean(), info_nce(queries, keys, 5.0, torch.arange(7)))


def correlated(count: int, width: int, rho: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    return x, rho * x + math.sqrt(1 - rho**2) * noise


@pytest.mark.parametrize(("rho", "width"), [(0.5, 2), (0.9, 2), (0.95, 8)])
def test_log_n_minus_the_loss_bounds_the_mutual_information(rho: float, width: int) -> None:
    information = -0.5 * width * math.log(1 - rho**2)
    bounds = []
    for seed in range(20):
        x, y = correlated(256, width, rho, seed)
        # The log density ratio, the best critic there is; its terms in x alone cancel in the softmax.
        critic = (2 * rho * x @ y.T - rho**2 * y.square().sum(1)) / (2 * (1 - rho**2))
        loss = contrastive_loss(critic, torch.arange(256))
        assert float(loss) >= 0
        bounds.append(math.log(256) - float(loss))
    estimate = sum(bounds) / len(bounds)
    assert estimate < min(information + 0.02, math.log(256))
    if information < math.log(256) / 2:
        assert estimate > information - 0.05


@pytest.mark.parametrize(
    "loss",
    [
        lambda scale, a, b: nt_xent_loss(a, b, scale),
        lambda scale, a, b: dcl_loss(a, b, scale, sigma=0.5),
        lambda scale, a, b: supcon_loss(a, b, LABELS, scale),
        lambda scale, a, b: unicl_loss(a, b, LABELS, scale, kind="negative_squared_euclidean"),
        lambda scale, a, b: moco_loss(a, b, a.flip(0), scale, 5),
        lambda scale, a, b: hcl_loss(a, b, scale, tau_plus=0.3).loss,
        lambda scale, a, b: hard_clip_loss(a, b, scale, hard=a.view(8, 1, 5), beta=0.2).loss,
    ],
)
def test_a_learned_scale_gets_its_gradient(loss: Callable[..., Tensor]) -> None:
    a, b = pairs(8)
    for shape in ((), (1,)):
        scale = torch.full(shape, 3.0, dtype=torch.float64, requires_grad=True)
        assert loss(scale, a, b).shape == ()
        assert torch.autograd.gradcheck(lambda s: loss(s, a, b), (scale,))
