"""Waiting for the work of one rank is not bounded by the time limit of a collective."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from clipkit import dist
from clipkit.data import waiting
from clipkit.types import ClipkitError, DataError


def test_alone_it_is_the_work_itself() -> None:
    assert waiting.while_others_wait(lambda: 7) == 7


def test_ranks_never_wait_long_in_one_collective(run_ranks: Callable[..., list[Any]]) -> None:
    for result, longest, whole in run_ranks(3, _patient):
        assert result in ("walked", None)
        assert whole > 2.9
        assert longest < 1.5


def _patient(rank: int, world_size: int) -> tuple[str | None, float, float]:
    waiting.INTERVAL_S = 0.1
    waits: list[float] = []
    gather = dist.gather_objects

    def timed(value: Any) -> list[Any]:
        began = time.monotonic()
        values = gather(value)
        waits.append(time.monotonic() - began)
        return values

    def work() -> str | None:
        time.sleep(0 if rank else 3)
        return None if rank else "walked"

    dist.gather_objects = timed
    dist.barrier()
    began = time.monotonic()
    return waiting.while_others_wait(work), max(waits), time.monotonic() - began


def test_a_failure_leaves_and_the_others_go_on(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(2, _failing) == ["no shard", None]


def _failing(rank: int, world_size: int) -> str | None:
    def work() -> None:
        if rank == 0:
            raise DataError("no shard", "bring it")

    if rank:
        waiting.while_others_wait(work)
        return None
    with pytest.raises(DataError) as caught:
        waiting.while_others_wait(work)
    return caught.value.cause


def test_an_unforeseen_failure_ends_the_wait_of_the_others_too(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(2, _surprised) == ["OSError", "OSError: no space"]


def _surprised(rank: int, world_size: int) -> str:
    def work() -> None:
        if rank == 0:
            raise OSError("no space")

    try:
        waiting.together(work)
    except OSError:
        return "OSError"
    except ClipkitError as error:
        return error.cause
    return "nothing"
