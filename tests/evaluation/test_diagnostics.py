"""Diagnostics against slow loops and against distributions whose values are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkit.evaluation import diagnostics
from clipkit.losses.geometry import spread


def unit(rows: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, width, generator=generator), dim=-1)


def test_similarity_summary_and_histogram_equal_loops() -> None:
    image, text = unit(30, 8, 1), unit(30, 8, 2)
    pairs, others, beaten = [], [], 0
    for i in range(30):
        for j in range(30):
            cosine = float(image[i] @ text[j])
            (pairs if i == j else others).append(cosine)
            beaten += i != j and cosine > float(image[i] @ text[i])
    found = diagnostics.similarity_summary(image, text)
    assert found["positive_similarity"] == pytest.approx(sum(pairs) / 30, abs=1e-6)
    assert found["negative_similarity"] == pytest.approx(sum(others) / 870, abs=1e-6)
    assert found["negatives_above_positive"] == pytest.approx(beaten / 870, abs=1e-6)
    shares = diagnostics.similarity_histogram(image, text, bins=20)
    assert len(shares["edges"]) == 21
    for name, values in (("positive", pairs), ("negative", others)):
        assert sum(shares[name]) == pytest.approx(1, abs=1e-5)
        for at in range(20):
            low, high = shares["edges"][at], shares["edges"][at + 1]
            count = sum(low <= value < high for value in values)
            assert shares[name][at] == pytest.approx(count / len(values), abs=1.5 / len(values))


def test_modality_gap_is_the_distance_of_the_means() -> None:
    rows = unit(50, 6)
    assert diagnostics.modality_gap(rows, rows) == pytest.approx(0, abs=1e-6)
    assert diagnostics.modality_gap(rows, rows + torch.tensor([3.0, 4, 0, 0, 0, 0])) == pytest.approx(5, 1e-5)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40)])
def test_effective_rank_equals_the_entropy_of_singular_values(shape: tuple[int, int]) -> None:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(3)).double()
    values = torch.linalg.svdvals(rows - rows.mean(0))
    shares = [float(v) / float(values.sum()) for v in values if v > 1e-12]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert diagnostics.effective_rank(rows) == pytest.approx(expected, rel=1e-4)


def test_effective_rank_counts_dimensions() -> None:
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(4))).Q[:, :5]
    signs = torch.tensor([[1.0 if (row >> bit) & 1 else -1.0 for bit in range(5)] for row in range(32)])
    assert diagnostics.effective_rank(signs @ basis.T) == pytest.approx(5, rel=1e-4)
    assert diagnostics.effective_rank(torch.ones(9, 4)) == 1.0


def test_effective_rank_does_not_count_rounding() -> None:
    # Rank 5 in 512 dimensions: hundreds of eigenvalues are rounding alone.
    rows = unit(600, 5, 6) @ torch.linalg.qr(torch.randn(512, 5)).Q.T
    assert diagnostics.effective_rank(rows.double()) == pytest.approx(
        diagnostics.effective_rank(unit(600, 5, 6).double()), rel=1e-5
    )


def test_spread_is_one_on_a_sphere_and_zero_when_collapsed() -> None:
    assert float(spread(unit(4000, 32))) == pytest.approx(1, abs=0.02)
    collapsed = torch.ones(100, 32) + 1e-3 * torch.randn(100, 32, generator=torch.Generator().manual_seed(5))
    assert float(spread(collapsed)) < diagnostics.COLLAPSED / 10
    # The centred rank calls the same rows healthy, which is why it does not raise the alarm.
    assert diagnostics.effective_rank(collapsed) > 20


def test_duplicates_are_counted_by_rows() -> None:
    assert diagnostics.duplicate_share(torch.tensor([5, 7, 5, 9, 7, 5])) == pytest.approx(5 / 6)
    assert diagnostics.duplicate_share(torch.arange(4)) == 0.0
    image, text = unit(6, 64, 1), unit(6, 64, 2)
    assert diagnostics.near_duplicate_share(image, text) == 0.0
    image[3], text[3] = image[0], text[0]
    image[4] = image[1]  # the picture again, with another caption
    assert diagnostics.near_duplicate_share(image, text) == pytest.approx(2 / 6)


def test_gradient_shares_sum_to_one() -> None:
    assert diagnostics.gradient_shares([3.0, 1.0]) == [0.75, 0.25]
    assert diagnostics.gradient_shares([0.0, 0.0]) == [0.0, 0.0]


def test_pairs_are_described_in_full() -> None:
    found = diagnostics.describe_pairs(unit(300, 16, 1), unit(300, 16, 2), limit=200)
    assert all(math.isfinite(value) for value in found.values())
    assert found["alignment"] == pytest.approx(2, abs=0.2)
    assert -4.2 < found["uniformity_image"] < -2.5
