"""Random states: the draws after a restore are the draws after the capture, in every library."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from clipkit.checkpoint import capture_rng, derive_rng, restore_rng
from clipkit.types import ClipkitError
from tests.checkpoint.children import save, single


@pytest.fixture(autouse=True)
def _generators_as_they_were() -> Iterator[None]:
    state = capture_rng()
    yield
    restore_rng(state)


def draws() -> list[object]:
    return [
        random.random(),
        random.gauss(0, 1),
        random.getrandbits(64),
        np.random.rand(3).tolist(),
        float(np.random.normal()),
        np.random.permutation(7).tolist(),
        torch.rand(3).tolist(),
        torch.randn(5).tolist(),
        torch.randperm(9).tolist(),
        torch.nn.functional.dropout(torch.ones(32)).tolist(),
    ]


@pytest.mark.parametrize("drawn", range(4))
def test_a_restored_state_continues_with_the_same_draws(tmp_path: Path, drawn: int) -> None:
    derive_rng(5, drawn, 0)
    for _ in range(drawn):
        # An odd number of Gaussians leaves the second of a pair inside python's and numpy's generators.
        random.gauss(0, 1)
        np.random.normal()
        torch.randn(3)
    save(single(tmp_path), 1, rank_tensors=capture_rng())
    wanted = [draws() for _ in range(400)]
    found = single(tmp_path).newest()
    assert found is not None
    state = found.rank_tensors(0)
    assert state is not None
    for _ in range(2):
        restore_rng(state)
        assert [draws() for _ in range(400)] == wanted


def test_capturing_changes_nothing() -> None:
    derive_rng(1, 2, 3)
    wanted = draws()
    derive_rng(1, 2, 3)
    capture_rng()
    assert draws() == wanted


def test_derived_states_differ_by_seed_step_and_rank() -> None:
    seen = []
    for arguments in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]:
        derive_rng(*arguments)
        seen.append(draws())
    assert seen[0] == seen[4]
    for part in zip(*seen[:4], strict=True):
        if part != (part[0],) * 4:
            continue
        raise AssertionError(f"one generator was not seeded: {part[0]}")


def test_a_replaced_numpy_generator_is_refused() -> None:
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        with pytest.raises(ClipkitError, match="generator was replaced"):
            capture_rng()
    finally:
        np.random.set_bit_generator(before)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA: pytest tests/checkpoint/test_rng.py on a GPU"
)
def test_cuda_draws_continue() -> None:
    state = capture_rng()
    wanted = [torch.randn(4, device=f"cuda:{i}").tolist() for i in range(torch.cuda.device_count())]
    restore_rng(state)
    assert [torch.randn(4, device=f"cuda:{i}").tolist() for i in range(torch.cuda.device_count())] == wanted
