"""The kernel of the softmax family, similarities and targets."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.losses.contrastive import (
    Form,
    contrastive_loss,
    global_mean,
    graded_targets,
    log_mean_over_ranks,
    same_label,
    similarity,
    smoothed_targets,
)
from tests.losses.inputs import unit_rows
from tests.oracles import rows_of, slow_cross_entropy, slow_shares, squared_gap

FORMS: tuple[Form, ...] = ("out", "in", "decoupled")


def matrix(rows: int = 5, columns: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def mask(rows: int = 5, columns: int = 8, seed: int = 1) -> Tensor:
    """About a third of the entries; row 2 has none."""
    found = matrix(rows, columns, seed) > 1.3
    found[2] = False
    found[0, 0] = found[1, 3] = True
    return found


def test_an_index_is_torch_cross_entropy_and_a_one_hot_row() -> None:
    logits, index = matrix(), torch.tensor([7, 0, 3, 3, 1])
    expected = F.cross_entropy(logits, index)
    assert torch.equal(contrastive_loss(logits, index), expected)
    one_hot = F.one_hot(index, 8)
    for positives in (one_hot.bool(), one_hot.double(), 3 * one_hot.double()):
        torch.testing.assert_close(contrastive_loss(logits, positives), expected, rtol=1e-14, atol=0)
        torch.testing.assert_close(
            contrastive_loss(logits, positives, form="in"), expected, rtol=1e-14, atol=0
        )
    torch.testing.assert_close(
        contrastive_loss(logits, index, form="decoupled"),
        contrastive_loss(logits, one_hot.bool(), form="decoupled"),
        rtol=1e-14,
        atol=0,
    )


def test_several_positives_are_averaged_after_the_log_or_before_it() -> None:
    logits, positives = matrix(), mask()
    out, inside = [], []
    for row, chosen in zip(rows_of(logits), positives.tolist(), strict=True):
        shares = [share for share, yes in zip(slow_shares(row), chosen, strict=True) if yes]
        if shares:
            out.append(-sum(map(math.log, shares)) / len(shares))
            inside.append(-math.log(sum(shares) / len(shares)))
    assert len(out) == 4
    assert float(contrastive_loss(logits, positives)) == pytest.approx(sum(out) / 4, rel=1e-13)
    assert float(contrastive_loss(logits, positives, form="in")) == pytest.approx(sum(inside) / 4, rel=1e-13)


def test_float_weights_are_soft_targets_whatever_their_sum() -> None:
    logits, weights = matrix(), matrix(seed=4).abs() * mask(seed=5)
    expected = slow_cross_entropy(logits, weights)
    assert float(contrastive_loss(logits, weights)) == pytest.approx(expected, rel=1e-13)
    sizes = torch.tensor([1e-3, 2, 1, 50, 7], dtype=torch.float64)[:, None]
    assert float(contrastive_loss(logits, sizes * weights)) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("seed", range(20))
def test_the_inner_mean_never_costs_more_than_the_outer(seed: int) -> None:
    logits, positives = matrix(seed=seed), mask(seed=seed + 100)
    assert contrastive_loss(logits, positives, form="in") <= contrastive_loss(logits, positives)


@pytest.mark.parametrize("index", range(8))
def test_info_nce_of_an_anchor_is_the_softplus_of_its_decoupled_loss(index: int) -> None:
    logits, positive = matrix(1), torch.tensor([index])
    decoupled = contrastive_loss(logits, positive, form="decoupled")
    torch.testing.assert_close(
        contrastive_loss(logits, positive), F.softplus(decoupled), rtol=1e-13, atol=1e-15
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_candidate_taken_out_has_no_influence_and_gets_no_gradient(form: Form) -> None:
    logits, positives, keep = matrix(), mask(), ~mask(seed=8)
    costs = []
    for value in (0.0, -math.inf, 1e6):
        changed = logits.masked_fill(~keep, value).requires_grad_()
        costs.append(contrastive_loss(changed, positives, keep=keep, form=form))
        (slope,) = torch.autograd.grad(costs[-1], changed)
        assert torch.isfinite(slope).all()
        assert not slope[~keep].any()
    assert costs[0] == costs[1] == costs[2]


def test_taking_out_a_column_is_not_having_it() -> None:
    logits, index = matrix(), torch.tensor([0, 1, 2, 3, 4])
    keep = torch.ones(5, 8, dtype=torch.bool)
    keep[:, 5:7] = False
    fewer = logits[:, [0, 1, 2, 3, 4, 7]]
    torch.testing.assert_close(contrastive_loss(logits, index, keep=keep), contrastive_loss(fewer, index))


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_of_three_is_three_copies_of_a_negative(form: Form) -> None:
    logits, index = matrix(), torch.tensor([0, 1, 2, 3, 4])
    weights = torch.zeros(5, 8, dtype=torch.float64)
    weights[:, 6] = math.log(3)
    copies = logits[:, [0, 1, 2, 3, 4, 5, 6, 6, 6, 7]]
    for positives in (index, F.one_hot(index, 8).bool()):
        torch.testing.assert_close(
            contrastive_loss(logits, positives, log_weights=weights, form=form),
            contrastive_loss(copies, index, form=form),
        )


@pytest.mark.parametrize("form", FORMS)
def test_anchors_that_ask_nothing_are_left_out(form: Form) -> None:
    logits, positives = matrix(), mask()
    positives[3] = True
    answered = torch.tensor([0, 1, 4] if form == "decoupled" else [0, 1, 3, 4])
    whole = logits.clone().requires_grad_()
    cost = contrastive_loss(whole, positives, form=form)
    (slope,) = torch.autograd.grad(cost, whole)
    torch.testing.assert_close(cost, contrastive_loss(logits[answered], positives[answered], form=form))
    assert torch.isfinite(slope).all()
    assert not slope[2].any()


@pytest.mark.parametrize("form", FORMS)
def test_no_positive_anywhere_costs_nothing(form: Form) -> None:
    logits = matrix().requires_grad_()
    cost = contrastive_loss(logits, torch.zeros(5, 8, dtype=torch.bool), form=form)
    assert cost.item() == 0
    assert not torch.autograd.grad(cost, logits)[0].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_extreme_logits_stay_finite(form: Form, factor: float) -> None:
    logits = (matrix().float() * factor).requires_grad_()
    cost = contrastive_loss(logits, mask(), form=form)
    assert torch.isfinite(cost)
    assert torch.isfinite(torch.autograd.grad(cost, logits)[0]).all()


def test_equal_logits_cost_the_log_of_the_number_of_candidates() -> None:
    logits = torch.full((5, 8), 2.5, dtype=torch.float64)
    assert float(contrastive_loss(logits, mask())) == pytest.approx(math.log(8))
    assert float(contrastive_loss(logits, torch.zeros(5, dtype=torch.int64))) == pytest.approx(math.log(8))


def test_forms_without_a_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="pass bool"):
        contrastive_loss(matrix(), mask().double(), form="decoupled")
    with pytest.raises(ValueError, match="out, in, decoupled"):
        contrastive_loss(matrix(), mask(), form="inside")  # type: ignore[arg-type]


def test_the_mean_is_over_the_anchors_of_all_ranks() -> None:
    values = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([9.0, 9.0, 4.0])]
    chosen = [torch.tensor([True, True, True]), torch.tensor([False, False, True])]
    share = torch.tensor([3 / 3, 1 / 3]).mean()
    means = [global_mean(v, c, lambda _: share) for v, c in zip(values, chosen, strict=True)]
    assert float(sum(means)) / 2 == pytest.approx((1 + 2 + 6 + 4) / 4)


def test_the_log_mean_over_ranks_survives_large_exponents() -> None:
    ranks = torch.tensor([[1000.0, -2000.0], [1010.0, -2080.0]], dtype=torch.float64)
    calls = iter([ranks.mean(0), (ranks - ranks.mean(0)).exp().mean(0)])
    found = log_mean_over_ranks(ranks[0], lambda x: next(calls))
    torch.testing.assert_close(found, ranks.logsumexp(0) - math.log(2))


def test_similarities_are_what_their_names_say() -> None:
    a, b = 3 * unit_rows(4, seed=1), unit_rows(5, seed=2) + 0.2
    for i, x in enumerate(rows_of(a)):
        for j, y in enumerate(rows_of(b)):
            product = sum(p * q for p, q in zip(x, y, strict=True))
            lengths = math.sqrt(sum(p * p for p in x) * sum(q * q for q in y))
            for kind, expected in (
                ("cosine", product / lengths),
                ("dot", product),
                ("negative_euclidean", -math.sqrt(squared_gap(x, y))),
                ("negative_squared_euclidean", -squared_gap(x, y)),
            ):
                found = similarity(a, b, kind)[i, j]  # type: ignore[arg-type]
                assert float(found) == pytest.approx(expected, rel=1e-12, abs=1e-14), kind
    with pytest.raises(ValueError, match="negative_euclidean"):
        similarity(a, b, "euclidean")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_have_distance_zero_and_no_gradient(dtype: torch.dtype) -> None:
    rows = (100 + unit_rows(30, 64)).to(dtype).requires_grad_()
    found = similarity(rows, rows.detach().clone(), "negative_euclidean").diagonal()
    assert not found.any()
    assert not torch.autograd.grad(found.sum(), rows)[0].any()


def test_labels_are_shared_and_the_unlabelled_share_nothing() -> None:
    found = same_label(torch.tensor([5, -1, 5, -1]))
    assert found.tolist() == [
        [True, False, True, False],
        [False, True, False, False],
        [True, False, True, False],
        [False, False, False, True],
    ]


def test_label_smoothing_is_that_of_torch() -> None:
    logits, index = matrix(), torch.tensor([7, 0, 3, 3, 1])
    targets = smoothed_targets(F.one_hot(index, 8).bool(), 0.1, torch.float64)
    expected = F.cross_entropy(logits, index, label_smoothing=0.1)
    torch.testing.assert_close(contrastive_loss(logits, targets), expected, rtol=1e-13, atol=0)


def test_graded_targets_follow_a_taxonomy() -> None:
    # Two animals and a tool: the distance counts the edges of a tree.
    distance = torch.tensor([[0, 2, 6], [2, 0, 6], [6, 6, 0]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0])
    targets = graded_targets(-distance[labels][:, labels], 2.0)
    torch.testing.assert_close(targets.sum(1), torch.ones(4, dtype=torch.float64))
    assert targets[0, 0] == targets[0, 3] > targets[0, 1] > targets[0, 2]
    # Colder targets leave the own class, and then graded targets are those of equal labels.
    logits = matrix(4, 4)
    torch.testing.assert_close(
        contrastive_loss(logits, graded_targets(-distance[labels][:, labels], 0.05)),
        contrastive_loss(logits, same_label(labels)),
    )


def test_graded_targets_of_the_captions_end_at_the_own_pair() -> None:
    captions = unit_rows(6)
    targets = graded_targets(similarity(captions, captions), 1e-4)
    torch.testing.assert_close(targets, torch.eye(6, dtype=torch.float64))
