"""Ranks from chunked counting equal the ranks of one obvious sort, ties and ragged captions included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from clipkit.evaluation.ranks import class_ranks, on_grid, retrieval_ranks
from tests.oracles import class_ranks_by_sorting, retrieval_ranks_by_sorting


def unit(rows: int, width: int, seed: int) -> Tensor:
    """Returns random unit rows in float32."""
    return functional.normalize(
        torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1
    )


@st.composite
def tied_sets(draw: Any) -> tuple[list[list[float]], list[list[float]], list[int], int]:
    """Images and texts on few directions, most scores tied; ragged, some images without text."""
    directions = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [-1.0, 0.0, 2.0]]
    rows = st.sampled_from(directions)
    images = draw(st.lists(rows, min_size=1, max_size=6))
    texts = draw(st.lists(rows, min_size=1, max_size=9))
    owners = [draw(st.integers(0, len(images) - 1)) for _ in texts]
    return images, texts, owners, draw(st.integers(1, 10))


@settings(max_examples=60, deadline=None)
@given(tied_sets())
def test_tied_and_ragged_ranks_equal_sorting(case: Any) -> None:
    images, texts, owners, chunk = case
    text_ranks, image_ranks = retrieval_ranks(
        on_grid(torch.tensor(images)), on_grid(torch.tensor(texts)), torch.tensor(owners), chunk
    )
    for ties_won, name in ((False, "pessimistic"), (True, "optimistic")):
        wanted_texts, wanted_images = retrieval_ranks_by_sorting(images, texts, owners, ties_won)
        assert getattr(text_ranks, name).tolist() == wanted_texts
        found = getattr(image_ranks, name).tolist()
        valid = image_ranks.valid.tolist()
        assert [rank if ok else None for rank, ok in zip(found, valid, strict=True)] == wanted_images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_ragged_ranks_equal_sorting(dtype: torch.dtype) -> None:
    images, texts = unit(23, 16, 0).to(dtype), unit(61, 16, 1).to(dtype)
    owners = torch.randint(0, 23, (61,), generator=torch.Generator().manual_seed(2))
    text_ranks, image_ranks = retrieval_ranks(on_grid(images), on_grid(texts), owners)
    wanted_texts, wanted_images = retrieval_ranks_by_sorting(images.tolist(), texts.tolist(), owners.tolist())
    assert text_ranks.pessimistic.tolist() == wanted_texts
    assert [
        rank if ok else None
        for rank, ok in zip(image_ranks.pessimistic.tolist(), image_ranks.valid.tolist(), strict=True)
    ] == wanted_images


def test_chunk_sizes_change_nothing() -> None:
    # Few directions in 512 dimensions: float32 products of equal rows differ between kernels; these may not.
    images, texts = unit(7, 512, 0).repeat(13, 1), unit(11, 512, 1).repeat(20, 1)
    owners = torch.arange(220) % 91
    whole = retrieval_ranks(on_grid(images), on_grid(texts), owners, 220)
    for chunk in (1, 2, 7, 64, 219, 1000, None):
        for one, other in zip(
            whole, retrieval_ranks(on_grid(images), on_grid(texts), owners, chunk), strict=True
        ):
            assert torch.equal(one.above, other.above)
            assert torch.equal(one.level, other.level)
    assert int(whole[0].level.min()) == 12  # each image exists 13 times, and every copy is tied


def test_grid_scores_are_exact_in_any_order_of_summation() -> None:
    rows = on_grid(unit(64, 1024, 3))
    scores = rows @ rows.T
    shuffled = torch.randperm(1024, generator=torch.Generator().manual_seed(4))
    assert torch.equal(scores, rows[:, shuffled] @ rows[:, shuffled].T)
    assert torch.equal(scores[5, 6], (rows[5] * rows[6]).flip(0).sum())
    assert float((rows - functional.normalize(unit(64, 1024, 3).double(), dim=1)).abs().max()) <= 2**-26


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(1, 6), st.randoms(use_true_random=False)
)
def test_class_ranks_equal_sorting_with_tied_classes(images: list[int], classes: int, random: Any) -> None:
    directions = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [-1.0, 0.5]]
    image_rows = [directions[i] for i in images]
    class_rows = [random.choice(directions) for _ in range(classes)]
    labels = [random.randrange(classes) for _ in images]
    ranks = class_ranks(
        on_grid(torch.tensor(image_rows)), on_grid(torch.tensor(class_rows)), torch.tensor(labels), chunk=3
    )
    assert ranks.tolist() == class_ranks_by_sorting(image_rows, class_rows, labels)


def test_no_block_of_scores_is_larger_than_agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            largest = max(largest, made.numel() if isinstance(made, Tensor) else 0)
            return made

    monkeypatch.setattr("clipkit.evaluation.ranks.BLOCK_ENTRIES", 1 << 14)
    images, texts, owners = on_grid(unit(900, 4, 0)), on_grid(unit(1500, 4, 1)), torch.arange(1500) % 900
    with Watch():
        retrieval_ranks(images, texts, owners)
        class_ranks(texts, images, owners)
    assert largest <= 1 << 14 < 900 * 1500
