"""What holds for every loss: ranks, gradients, precision, order of samples, rotation, exchange of views."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.losses.cases import CASES, Case
from tests.losses.inputs import over_ranks, rotation

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def leaves(case: Case) -> dict[str, Tensor]:
    """The rows, those of floats as leaves that take a gradient."""
    return {name: x.clone().requires_grad_() if x.is_floating_point() else x for name, x in case.rows.items()}


def gradients(value: Tensor, rows: dict[str, Tensor]) -> dict[str, Tensor | None]:
    names = [name for name, x in rows.items() if x.requires_grad]
    return dict(
        zip(names, torch.autograd.grad(value, [rows[n] for n in names], allow_unused=True), strict=True)
    )


@pytest.mark.parametrize("world", [2, 3, (1, 6, 5)])
@every_case
def test_the_mean_over_ranks_is_one_big_batch(case: Case, world: int | tuple[int, ...]) -> None:
    alone, split = leaves(case), leaves(case)
    whole, parts = case.whole(alone), over_ranks(world, split, case.loss)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-13)
    found = gradients(parts, split)
    for name, expected in gradients(whole, alone).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12, msg=f"gradient of {name}")


@every_case
def test_gradients_are_those_of_finite_differences(case: Case) -> None:
    rows = leaves(case)

    def value(*changed: Tensor) -> Tensor:
        return case.whole({**rows, **dict(zip(case.smooth, changed, strict=True))})

    if case.smooth:
        assert torch.autograd.gradcheck(value, [rows[name] for name in case.smooth])


@every_case
def test_values_are_finite_scalars_of_the_precision_of_the_input(case: Case) -> None:
    exact = case.whole()
    single = case.whole({n: x.float() if x.is_floating_point() else x for n, x in case.rows.items()})
    assert exact.shape == single.shape == ()
    assert exact.dtype == torch.float64
    assert single.dtype == torch.float32
    assert torch.isfinite(exact)
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-6)


@every_case
def test_gradients_are_finite_and_not_zero(case: Case) -> None:
    rows = leaves(case)
    found = gradients(case.whole(rows), rows)
    assert all(torch.isfinite(x).all() for x in found.values() if x is not None)
    assert all(found[name] is not None and found[name].abs().max() > 0 for name in case.smooth or ("a",))  # type: ignore[union-attr]


@every_case
def test_the_order_of_samples_does_not_matter(case: Case) -> None:
    order = torch.randperm(len(case.rows["a"]), generator=torch.Generator().manual_seed(1))
    shuffled = case.whole({name: x[order] for name, x in case.rows.items()})
    torch.testing.assert_close(shuffled, case.whole(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", [case for case in CASES if case.rotates], ids=lambda case: case.name)
def test_a_common_rotation_does_not_matter(case: Case) -> None:
    turned = {
        name: x @ rotation(x.shape[-1]) if x.is_floating_point() else x for name, x in case.rows.items()
    }
    torch.testing.assert_close(case.whole(turned), case.whole(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", [case for case in CASES if case.swaps], ids=lambda case: case.name)
def test_the_views_can_change_places(case: Case) -> None:
    swapped = {**case.rows, "a": case.rows["b"], "b": case.rows["a"]}
    torch.testing.assert_close(case.whole(swapped), case.whole(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.positive_scaling], ids=lambda case: case.name
)
def test_losses_of_cosines_ignore_lengths_and_push_sideways_only(case: Case) -> None:
    rows = leaves(case)
    longer = {name: x * 7 if x.is_floating_point() else x for name, x in case.rows.items()}
    value = case.whole(rows)
    torch.testing.assert_close(case.whole(longer), value, rtol=1e-11, atol=1e-13)
    for name, slope in gradients(value, rows).items():
        if slope is not None:
            assert (rows[name] * slope).sum(1).abs().max() < 1e-15
